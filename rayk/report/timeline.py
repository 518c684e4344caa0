"""The report's timeline: when the rollouts of each step were generated, scored and trained on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rayk.report.figures import Group, Panel, as_svg
from rayk.report.run_directory import Run

_STEPS = 8
_LANES = {
    "generate": "student generates", "score": "teacher scores", "wait": "training waits", "train": "student trains"
}  # fmt: skip
_COLORS = ("#2f6db5", "#d9730d", "#2c8a63", "#b23a6f")
_WAIT_COLOR, _INK = "#d5d9de", "#5b6470"


@dataclass(frozen=True)
class _Bar:
    """A lane's work for one step, from `start` to `end` in seconds."""

    lane: str
    step: int
    start: float
    end: float


def draw_timelines(runs: list[Run]) -> list[Group]:
    """Draw a figure for each run with a teacher; it shows some steps from the middle of the run."""
    panels = [panel for run in runs if (panel := _timeline(run)) is not None]
    return [Group("Timeline", 1, panels)] if panels else []


def _timeline(run: Run) -> Panel | None:
    rows = [row for row in run.rows if "ended_at" in row and "score_started_at" in row]
    first = max(0, (len(rows) - _STEPS) // 2)
    rows = rows[first : first + _STEPS]
    if not rows:
        return None
    bars = [bar for row in rows for bar in _bars(row)]
    lanes = [lane for lane in _LANES if any(bar.lane == lane for bar in bars)]
    figure = Figure(figsize=(10.6, 0.7 + 0.42 * len(lanes)), layout="constrained")
    _draw(figure.add_subplot(), bars, lanes)
    steps = f"steps {rows[0]['step']:,} to {rows[-1]['step']:,}" if len(rows) > 1 else f"step {rows[0]['step']:,}"
    about = (
        f"Worker 0, {steps}; each color is one step. Generating and scoring cost no time while the student trains "
        "on an earlier step."
    )
    label = f"Timeline of {run.label}, {steps}: " + ", ".join(
        f"{_LANES[lane]} {sum(bar.end - bar.start for bar in bars if bar.lane == lane):.3g} s" for lane in lanes
    )
    return Panel(run.label, about, as_svg(figure, label + "."))


def _bars(row: Mapping[str, Any]) -> list[_Bar]:
    """Return the bars of one row of `metrics.jsonl`."""
    step, end = row["step"], row["ended_at"]
    train_start = end - row["step_seconds"] + row["teacher_wait_seconds"]
    train_end = end - row.get("policy_wait_seconds", 0.0)
    bars = [
        _Bar("wait", step, end - row["step_seconds"], train_start),
        _Bar("train", step, train_start, train_end),
        *([_Bar("wait", step, train_end, end)] if train_end < end else []),
    ]
    for lane in ("generate", "score"):
        start = row.get(f"{lane}_started_at")
        if start is not None:
            bars.append(_Bar(lane, step, start, start + row[f"{lane}_seconds"]))
    return bars


def _draw(axes: Axes, bars: list[_Bar], lanes: list[str]) -> None:
    """Draw a row per lane; bars that overlap within a lane are stacked."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#b9bfc7")
    axes.tick_params(colors=_INK, labelsize=8, length=0)
    axes.set_yticks(range(len(lanes)), [_LANES[lane] for lane in lanes])
    axes.set_ylim(len(lanes) - 0.5, -0.5)
    axes.set_xlabel("seconds", color=_INK, fontsize=8, loc="right", labelpad=1)
    origin = min(bar.start for bar in bars)
    for position, lane in enumerate(lanes):
        levels = _stack([bar for bar in bars if bar.lane == lane])
        height = 0.8 / (1 + max(level for _, level in levels))
        for bar, level in levels:
            color = _WAIT_COLOR if lane == "wait" else _COLORS[bar.step % len(_COLORS)]
            low = position - 0.4 + level * height
            axes.broken_barh([(bar.start - origin, bar.end - bar.start)], (low, 0.9 * height), facecolors=color)


def _stack(bars: list[_Bar]) -> list[tuple[_Bar, int]]:
    """Return each bar with the lowest level at which it overlaps no earlier bar."""
    ends: list[float] = []
    placed = []
    for bar in sorted(bars, key=lambda bar: bar.start):
        level = next((level for level, end in enumerate(ends) if end <= bar.start), len(ends))
        ends[level : level + 1] = [bar.end]
        placed.append((bar, level))
    return placed
