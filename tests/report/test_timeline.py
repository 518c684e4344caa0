"""The timeline shows the times in the rows, and is absent where rows have no times."""

import pytest

from rayk.report.run_directory import Run
from rayk.report.timeline import _bars, _stack, draw_timelines


def row(step: int, *, generated: bool = True, stale: bool = False) -> dict[str, float]:
    """A step of 2 s that ends at 102, 104 …, with half a second of waiting; its rollouts were generated and scored just
    before, or one step earlier with a stale policy."""
    before = 98.0 if stale else 100.0
    times = {"generate_started_at": before + 2 * (step - 1), "generate_seconds": 1.5} if generated else {}
    return times | {
        "step": step, "ended_at": 100.0 + 2 * step, "step_seconds": 2.0, "teacher_wait_seconds": 0.5,
        "score_started_at": before + 1.5 + 2 * (step - 1), "score_seconds": 0.25,
    }  # fmt: skip


def run_of(rows: list[dict[str, float]]) -> Run:
    return Run(None, "run", 0, {"method": {"kind": "on_policy"}}, rows, None)  # type: ignore[arg-type]


def test_bars_match_the_times_in_the_row():
    bars = {bar.lane: (bar.start, bar.end) for bar in _bars(row(3))}
    assert bars == {
        "wait": (104.0, 104.5), "train": (104.5, 106.0), "generate": (104.0, 105.5), "score": (105.5, 105.75)
    }  # fmt: skip


def test_waiting_for_the_policy_ends_the_step():
    bars = [(bar.lane, bar.start, bar.end) for bar in _bars(row(3) | {"policy_wait_seconds": 0.25})]
    assert bars[:3] == [("wait", 104.0, 104.5), ("train", 104.5, 105.75), ("wait", 105.75, 106.0)]


def test_label_names_the_seconds_of_each_lane():
    (group,) = draw_timelines([run_of([row(step) for step in range(1, 31)])])
    (panel,) = group.panels
    assert "steps 12 to 19" in panel.about
    for words in ("student generates 12 s", "teacher scores 2 s", "training waits 4 s", "student trains 12 s"):
        assert words in panel.svg


def test_rows_of_the_data_have_no_generation_lane():
    (group,) = draw_timelines([run_of([row(1, generated=False)])])
    assert "student generates" not in group.panels[0].svg
    assert "step 1;" in group.panels[0].about


def test_runs_without_a_teacher_have_no_timeline():
    old = {"step": 1, "step_seconds": 2.0, "teacher_wait_seconds": 0.0}
    assert draw_timelines([run_of([]), run_of([old])]) == []


@pytest.mark.parametrize("late", [0.0, 0.2])
def test_overlapping_bars_are_stacked(late):
    bars = [bar for step in (1, 2, 3) for bar in _bars(row(step)) if bar.lane == "generate"]
    assert {level for _, level in _stack(bars)} == {0}
    longer = [type(bar)(bar.lane, bar.step, bar.start, bar.end + 1 + late) for bar in bars]
    assert [level for _, level in _stack(longer)] == [0, 1, 0]
