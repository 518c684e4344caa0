"""The timeline shows what its rows say, and nothing where they do not say when."""

import pytest

from rayk.report.run_directory import Run
from rayk.report.timeline import _bars, _stacked, draw_timelines


def row(step: int, *, written: bool = True, stale: bool = False) -> dict[str, float]:
    """Steps of 2 s that end at 102, 104 …, of which half a second is waiting; written and scored just before, or, where
    the policy may be stale, one step earlier."""
    before = 98.0 if stale else 100.0
    times = {"generate_started_at": before + 2 * (step - 1), "generate_seconds": 1.5} if written else {}
    return times | {
        "step": step, "ended_at": 100.0 + 2 * step, "step_seconds": 2.0, "teacher_wait_seconds": 0.5,
        "score_started_at": before + 1.5 + 2 * (step - 1), "score_seconds": 0.25,
    }  # fmt: skip


def run_of(rows: list[dict[str, float]]) -> Run:
    return Run(None, "mine", 0, {"method": {"kind": "on_policy"}}, rows, None)  # type: ignore[arg-type]


def test_bars_stand_where_the_row_says():
    bars = {bar.lane: (bar.start, bar.end) for bar in _bars(row(3))}
    assert bars == {
        "wait": (104.0, 104.5), "train": (104.5, 106.0), "generate": (104.0, 105.5), "score": (105.5, 105.75)
    }  # fmt: skip


def test_waiting_for_the_policy_ends_the_step():
    bars = [(bar.lane, bar.start, bar.end) for bar in _bars(row(3) | {"policy_wait_seconds": 0.25})]
    assert bars[:3] == [("wait", 104.0, 104.5), ("train", 104.5, 105.75), ("wait", 105.75, 106.0)]


def test_figure_says_what_each_lane_took():
    (group,) = draw_timelines([run_of([row(step) for step in range(1, 31)])])
    (panel,) = group.panels
    assert "steps 12 to 19" in panel.about
    for words in ("student writes 12 s", "teacher asked 2 s", "learner waits 4 s", "learner trains 12 s"):
        assert words in panel.svg


def test_rows_of_the_data_have_no_writer():
    (group,) = draw_timelines([run_of([row(1, written=False)])])
    assert "student writes" not in group.panels[0].svg
    assert "step 1;" in group.panels[0].about


def test_runs_that_ask_nobody_have_no_timeline():
    old = {"step": 1, "step_seconds": 2.0, "teacher_wait_seconds": 0.0}
    assert draw_timelines([run_of([]), run_of([old])]) == []


@pytest.mark.parametrize("late", [0.0, 0.2])
def test_what_overlaps_is_stacked(late):
    bars = [bar for step in (1, 2, 3) for bar in _bars(row(step)) if bar.lane == "generate"]
    assert {level for _, level in _stacked(bars)} == {0}
    longer = [type(bar)(bar.lane, bar.step, bar.start, bar.end + 1 + late) for bar in bars]
    assert [level for _, level in _stacked(longer)] == [0, 1, 0]
