"""The report's curves, as inline SVG."""

import io
import re
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from rayk.report.run_directory import Run, Series, flattened, teachers_of

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_INK, _GRID = "#5b6470", "#e6e8eb"
_PAGE_INCHES = 10.6
_RAW_POINTS = 400
SMOOTHED_SHARE = 1 / 25


@dataclass(frozen=True)
class Panel:
    """One figure: an inline SVG with its caption."""

    title: str
    about: str
    svg: Markup


@dataclass(frozen=True)
class Group:
    """Figures that stand in one row, or in rows of `columns`."""

    title: str
    columns: int
    panels: list[Panel]


@dataclass(frozen=True)
class Plot:
    """What a panel shows and how its axis is to be read."""

    title: str
    about: str
    curves: list[Series]
    style: str = "noisy"
    """`noisy`: each step light, their running mean strong; `exact`: a line; `points`: a line with marks."""
    axis: str = "number"
    reference: float | None = None
    """The teacher's value, a dotted line."""


def draw_figures(runs: list[Run]) -> list[Group]:
    """The figures that the runs have data for."""
    groups = [
        ("Training loss", 2, _loss_plots(runs)),
        ("Measured on held-out rows during training", 3, _evaluation_plots(runs)),
        ("Speed", 2, [
            Plot("Tokens per second", "Training rows' tokens, padding not counted.",
                 _curves(runs, "tokens_per_second"), axis="count"),
            Plot("Waiting for the teacher", "Seconds each step stood still for its batch.",
                 _curves(runs, "teacher_wait_seconds")),
            Plot("Waiting for the policy", "Seconds each step stood still until what its weights were promised for was "
                 "written.", _curves(runs, "policy_wait_seconds")),
            Plot("Writing", "Seconds in which the student wrote a step's completions, ahead of it.",
                 _curves(runs, "generate_seconds")),
            Plot("Scoring", "Seconds from a step's first question to the teacher to its last answer, ahead of it.",
                 _curves(runs, "score_seconds")),
        ]),
        ("What the student writes while it learns", 2, [
            Plot("Length", "Tokens a completion.", _curves(runs, "rollout_tokens"), axis="count"),
            Plot("Ended by itself", "Share of completions with an end token before the limit.",
                 _curves(runs, "rollout_stopped"), axis="share"),
            Plot("Repetition", "Share of 4-grams seen before in the completion.",
                 _curves(runs, "rollout_repetition"), axis="share"),
            Plot("Accepted by the teacher", "Share of the student's proposals that stayed, where both write.",
                 [curve for curve in _curves(runs, "rollout_acceptance") if curve.values.min() < 1], axis="share"),
        ]),
        ("Preferences of the training pairs", 2, [
            Plot("Reward margin", "Chosen over rejected, β times nats over the reference.",
                 _curves(runs, "reward_margin")),
            Plot("Reward accuracy", "Share of pairs whose chosen answer has the higher reward.",
                 _curves(runs, "reward_accuracy"), axis="share"),
            Plot("Log-prob of the chosen", "Nats an answer. It may fall with the rejected one's.",
                 _curves(runs, "chosen_logprob")),
            Plot("Log-prob of the rejected", "Nats an answer.", _curves(runs, "rejected_logprob")),
        ]),
        ("Optimiser", 2, [
            Plot("Learning rate", "After warm-up and schedule.", _curves(runs, "learning_rate"), style="exact"),
            Plot("Gradient norm", "Before clipping. Spikes or growth hint at an unstable run.",
                 _curves(runs, "gradient_norm")),
        ]),
    ]  # fmt: skip
    found = []
    for title, most, plots in groups:
        plots = [plot for plot in plots if plot.curves]
        if plots:
            columns = min(most if len(plots) <= 4 else 3, len(plots))
            found.append(Group(title, columns, [_panel(plot, columns, title == "Optimiser") for plot in plots]))
    return found


def _loss_plots(runs: list[Run]) -> list[Plot]:
    """Cross-entropy of all runs on one axis; each other objective on its own, since their units do not compare."""
    plots = [
        Plot("Cross-entropy", "On the tokens learned from, in nats: the data's, or what the student wrote itself.",
             _curves(runs, "cross_entropy"))
    ]  # fmt: skip
    objectives: dict[str, list[Series]] = {}
    for run in runs:
        loss, cross_entropy = run.series("loss"), run.series("cross_entropy")
        if loss is None or (
            cross_entropy is not None and len(loss.values) == len(cross_entropy.values)
            and np.allclose(loss.values, cross_entropy.values)
        ):  # fmt: skip
            continue
        objectives.setdefault(_objective(run), []).append(loss)
    for about, curves in objectives.items():
        kind = curves[0].run.method
        plots.append(Plot(f"Objective of {kind}", f"{about}. Not comparable with other objectives.", curves))
    seen = _curves(runs, "student_mass")
    plots.append(
        Plot("Compared mass", "Share of the student's probability that is on tokens the teacher names. The divergence "
             "does not see where the rest of it goes.", seen, axis="share")
    )  # fmt: skip
    return plots


def _objective(run: Run) -> str:
    """What a run minimises, in words."""
    settings = flattened({k: v for k, v in run.config["method"].items() if k not in ("kind", "teacher", "support")})
    parts = [
        f"{name.removesuffix('.name').replace('_', ' ').replace('.', ' ')} "
        f"{format(value, 'g') if isinstance(value, float) else value}"
        for name, value in settings.items() if value is not None and value is not False
    ]  # fmt: skip
    return f"What {run.method} minimises" + (f" ({', '.join(parts)})" if parts else "")


def _evaluation_plots(runs: list[Run]) -> list[Plot]:
    teachers = teachers_of(runs)
    reference = teachers[0][1].get("loss") if len(teachers) == 1 else None
    plots = [
        Plot("Loss", "Cross-entropy, nats a token." + (" Dotted: the teacher's." if reference is not None else ""),
             _curves(runs, "evaluation_loss"), style="points", reference=reference),
        Plot("Forward KL to teacher", "Nats a token; 0 is the teacher itself.",
             _curves(runs, "evaluation_forward_kl"), style="points"),
        Plot("Agreement with teacher", "Same first choice of token.",
             _curves(runs, "evaluation_agreement"), style="points", axis="share"),
        Plot("Preference margin", "Log-prob of the chosen answers less the rejected ones', nats a pair.",
             _curves(runs, "evaluation_preference_margin"), style="points"),
        Plot("Preference accuracy", "Share of pairs whose chosen answer is the likelier one.",
             _curves(runs, "evaluation_preference_accuracy"), style="points", axis="share"),
    ]  # fmt: skip
    # A single point is the final table's number.
    return [plot for plot in plots if any(len(curve.steps) > 1 for curve in plot.curves)]


def _curves(runs: list[Run], name: str) -> list[Series]:
    return [series for run in runs if (series := run.series(name)) is not None]


def _panel(plot: Plot, columns: int, small: bool) -> Panel:
    height = 2.0 if small else {1: 3.2, 2: 2.9, 3: 2.6}[columns]
    figure = Figure(figsize=(_PAGE_INCHES / columns, height), layout="constrained")
    axes = figure.add_subplot()
    _dress(axes, plot.axis)
    for curve in plot.curves:
        _draw(axes, curve, plot.style)
    if plot.reference is not None:
        axes.axhline(plot.reference, color=_INK, linewidth=1, linestyle=":")
    cropped = plot.style == "noisy" and _crop(axes, plot.curves)
    about = plot.about + (" The highest spikes are cut off." if cropped else "")
    ends = ", ".join(f"{c.run.label} {c.values[0]:.3g} to {c.values[-1]:.3g}" for c in plot.curves)
    label = f"Line chart of {plot.title.lower()} over training steps, from first to last: {ends}."
    return Panel(plot.title, about, as_svg(figure, label))


def _dress(axes: Axes, axis: str) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#b9bfc7")
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, labelsize=8, length=0)
    axes.tick_params(axis="x", length=3, color="#b9bfc7")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel("step", color=_INK, fontsize=8, loc="right", labelpad=1)
    if axis == "share":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    else:
        form = "{:,.0f}" if axis == "count" else "{:.4g}"
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: form.format(value)))


def _draw(axes: Axes, curve: Series, style: str) -> None:
    look: dict[str, Any] = {"color": curve.run.colour, "linestyle": curve.run.dash, "linewidth": 1.6}
    if style == "points":
        look |= {"marker": _MARKERS[curve.run.place % len(_MARKERS)], "markersize": 4, "markeredgewidth": 0}
    elif len(curve.steps) == 1:
        look |= {"marker": "o", "markersize": 4}
    values = curve.values
    if style == "noisy" and _window(curve) > 1:
        axes.plot(*_thinned(curve.steps, values), color=curve.run.colour, linewidth=0.8, alpha=0.22)
        values = _smoothed(values, _window(curve))
    axes.plot(*_thinned(curve.steps, values), **look)


def _window(curve: Series) -> int:
    """Steps averaged into one point of the smoothed line: odd, 1 for short runs."""
    return 2 * round(len(curve.steps) * SMOOTHED_SHARE / 2) + 1


def _smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Centred running mean. It begins with a window of one, since a steep start would be bent; at the end, where noise
    would be read as the result, it keeps what is left of the window."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    before = np.minimum(places, window // 2)
    after = np.minimum(before, places[::-1])
    return (sums[places + after + 1] - sums[places - before]) / (before + after + 1)


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest point of each stretch: what long runs look like, in few points."""
    if len(steps) <= _RAW_POINTS:
        return steps, values
    parts = np.array_split(np.arange(len(steps)), _RAW_POINTS // 2)
    kept = np.unique([part[pick(values[part])] for part in parts for pick in (np.argmin, np.argmax)])
    kept = np.unique(np.concatenate([[0], kept, [len(steps) - 1]]))
    return steps[kept], values[kept]


def _crop(axes: Axes, curves: list[Series]) -> bool:
    """Cut off rare spikes that would flatten all the rest; True if there were any."""
    values = np.concatenate([curve.values for curve in curves])
    low, high = min(values.min(), 0), np.quantile(values, 0.99)
    if high <= low or values.max() < 3 * (high - low) + low:
        return False
    axes.set_ylim(low - 0.05 * (high - low), low + 1.25 * (high - low))
    return True


def as_svg(figure: Figure, label: str) -> Markup:
    """`figure` for a page: its text as text, scaled to its place, without what only files need."""
    buffer = io.StringIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": label, "text.parse_math": False, "axes.unicode_minus": True}
    with matplotlib.rc_context(settings):
        FigureCanvasSVG(figure).print_svg(buffer)
    text = buffer.getvalue()
    box = re.search(r'viewBox="[^"]+"', text)
    assert box is not None
    body = re.sub(r"<metadata>.*?</metadata>", "", text[text.index(">", box.end()) + 1 :], flags=re.DOTALL)
    # The groups' ids come again in every figure.
    body = re.sub(r"\n\s*", "\n", re.sub(r'<g id="[^"]*"', "<g", body))
    return Markup(f'<svg {box[0]} role="img" aria-label="{escape(label)}">') + Markup(body)
