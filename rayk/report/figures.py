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
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rayk.report.run_directory import Run, Series, flatten, measured_teachers, wait_seconds

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_PART_LINES = ("-", (0, (4, 1)), (0, (2, 1)), (0, (1, 1)))
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
    """Figures under one title, in rows of `columns`."""

    title: str
    columns: int
    panels: list[Panel]


@dataclass(frozen=True)
class Plot:
    """The curves of a panel, and how to draw them."""

    title: str
    about: str
    curves: list[Series]
    style: str = "noisy"
    """`noisy`: pale values with a strong running mean; `exact`: a line; `points`: a line with markers."""
    axis: str = "number"
    reference: float | None = None
    """The teacher's value, drawn as a dotted line."""


def draw_figures(runs: list[Run]) -> list[Group]:
    """Draw the figures for which the runs have data."""
    groups = [
        ("Training loss", 2, _loss_plots(runs)),
        ("Measured on held-out rows during training", 3, _evaluation_plots(runs)),
        ("Speed", 2, [
            Plot("Tokens per second", "Tokens of training rows, without padding.",
                 _curves(runs, "tokens_per_second"), axis="count"),
            Plot("Waiting for the teacher", "Seconds per step until the teacher's signals had arrived.",
                 _wait_curves(runs, 0)),
            Plot("Waiting for rollouts", "Seconds per step until the student had generated its rollouts.",
                 [curve for curve in _wait_curves(runs, 1) if curve.values.any()]),
            Plot("Generating", "Seconds in which the student generated a step's rollouts.",
                 _curves(runs, "generate_seconds")),
            Plot("Scoring", "Seconds from a step's first request to the teacher to its last response.",
                 _curves(runs, "score_seconds")),
        ]),
        ("Rollouts", 2, [
            Plot("Length", "Tokens per rollout.", _curves(runs, "rollout_tokens"), axis="count"),
            Plot("Ended", "Share of rollouts with an end token before the limit.",
                 _curves(runs, "rollout_stopped"), axis="share"),
            Plot("Turns", "Turns of the student per rollout (rollouts.tool).",
                 [curve for curve in _curves(runs, "rollout_turns") if curve.values.max() > 1], axis="count"),
            Plot("Task reward", "Mean reward of a step's rollouts (method.reward).", _curves(runs, "rollout_reward")),
            Plot("Repetition", "Share of 4-grams that occurred before in the rollout.",
                 _curves(runs, "rollout_repetition"), axis="share"),
            Plot("Accepted by the teacher", "Share of the student's drafted tokens that teacher-mixed sampling kept.",
                 [curve for curve in _curves(runs, "rollout_acceptance") if curve.values.min() < 1], axis="share"),
        ]),
        ("Student and teacher on the tokens of a step", 3, _comparison_plots(runs)),
        ("Teachers", 3, _teacher_plots(runs)),
        ("Preferences on the training pairs", 2, [
            Plot("Reward margin", "β times the log-prob gain over the reference, chosen minus rejected.",
                 _curves(runs, "reward_margin")),
            Plot("Reward accuracy", "Share of pairs whose chosen completion has the higher reward.",
                 _curves(runs, "reward_accuracy"), axis="share"),
            Plot("Log-prob of the chosen", "Nats per completion. It may fall together with the rejected one's.",
                 _curves(runs, "chosen_logprob")),
            Plot("Log-prob of the rejected", "Nats per completion.", _curves(runs, "rejected_logprob")),
        ]),
        ("Optimizer", 2, [
            Plot("Learning rate", "With warm-up and schedule.", _curves(runs, "learning_rate"), style="exact"),
            Plot("Gradient norm", "Before clipping. Spikes or growth indicate an unstable run.",
                 _curves(runs, "gradient_norm")),
        ]),
    ]  # fmt: skip
    found = []
    for title, max_columns, plots in groups:
        plots = [plot for plot in plots if plot.curves]
        if plots:
            columns = min(max_columns if len(plots) <= 4 else 3, len(plots))
            found.append(Group(title, columns, [_panel(plot, columns, title == "Optimizer") for plot in plots]))
    return found


def _loss_plots(runs: list[Run]) -> list[Plot]:
    """Return the plot of cross-entropy for all runs, and one plot per other objective, because their units differ."""
    plots = [
        Plot("Cross-entropy", "On the counted tokens, in nats: those of the data, or of the student's rollouts.",
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
    plots.append(
        Plot("Compared mass", "Share of the student's probability on the tokens in the teacher's signal. The "
             "divergence does not depend on how the rest is distributed.", _curves(runs, "student_mass"), axis="share")
    )  # fmt: skip
    return plots


def _objective(run: Run) -> str:
    """Describe the loss that a run minimizes."""
    settings = flatten({k: v for k, v in run.config["method"].items() if k not in ("kind", "teacher", "support")})
    parts = [
        f"{name.removesuffix('.name').replace('_', ' ').replace('.', ' ')} "
        f"{format(value, 'g') if isinstance(value, float) else value}"
        for name, value in settings.items()
        if value is not None and value is not False and (name, value) != ("normalize", "tokens")
    ]  # fmt: skip
    return f"The loss of {run.method}" + (f" ({', '.join(parts)})" if parts else "")


def _comparison_plots(runs: list[Run]) -> list[Plot]:
    """Return the plots of runs with rollouts that show whether the teacher's signal can teach the student."""
    quarters = ["first quarter", "second", "third", "last"]
    return [
        Plot("Overlap", "Share of the teacher's 16 most likely tokens that are among the student's 16.",
             _curves(runs, "overlap"), axis="share"),
        Plot("Disagreement", "Share of tokens for which the most likely tokens differ.", _curves(runs, "disagreement"),
             axis="share"),
        Plot("Entropy of the teacher", "Nats per token, over the tokens of the signal and all others as one.",
             _curves(runs, "teacher_entropy")),
        Plot("Entropy of the student", "Nats per token, over the same outcomes.", _curves(runs, "student_entropy")),
        Plot("Distance along the completion", "Divergence or log-ratio per token, in each quarter of the completions.",
             [series for run in runs for place, part in enumerate(quarters)
              if (series := run.series(f"distance_quarter_{place + 1}", part, place)) is not None]),
    ]  # fmt: skip


def _teacher_plots(runs: list[Run]) -> list[Plot]:
    """Return the plots with a curve for each of several teachers."""

    def curves(value: str) -> list[Series]:
        found = [
            run.series(f"teacher/{name}/{value}", name, place)
            for run in runs for place, name in enumerate(run.routed_teachers)
        ]  # fmt: skip
        return [series for series in found if series is not None]

    return [
        Plot("Loss by teacher", "Mean over the tokens that the teacher scored.", curves("loss")),
        Plot("Tokens by teacher", "Counted tokens in a step.", curves("tokens"), axis="count"),
        Plot("Scoring by teacher", "Seconds per step in which requests to the teacher were open.",
             curves("score_seconds")),
    ]  # fmt: skip


def _evaluation_plots(runs: list[Run]) -> list[Plot]:
    teachers = measured_teachers(runs)
    reference = teachers[0][1].get("loss") if len(teachers) == 1 else None
    plots = [
        Plot("Loss", "Cross-entropy, nats per token." + (" Dotted: the teacher's." if reference is not None else ""),
             _curves(runs, "evaluation_loss"), style="points", reference=reference),
        Plot("Forward KL to teacher", "Nats per token; 0 means equal to the teacher.",
             _curves(runs, "evaluation_forward_kl"), style="points"),
        Plot("Agreement with teacher", "Share of tokens with the same most likely token.",
             _curves(runs, "evaluation_agreement"), style="points", axis="share"),
        Plot("Accuracy", "Share of the evaluation prompts answered correctly.",
             _curves(runs, "evaluation_accuracy"), style="points", axis="share"),
        Plot("ROUGE-L", "Longest common subsequence of answer and reference, F.",
             _curves(runs, "evaluation_rouge_l"), style="points"),
        Plot("Preference margin", "Log-prob of the chosen completion minus the rejected one, nats per pair.",
             _curves(runs, "evaluation_preference_margin"), style="points"),
        Plot("Preference accuracy", "Share of pairs whose chosen completion is more likely.",
             _curves(runs, "evaluation_preference_accuracy"), style="points", axis="share"),
    ]  # fmt: skip
    # A single point is not drawn, because the table of results has its value.
    return [plot for plot in plots if any(len(curve.steps) > 1 for curve in plot.curves)]


def _curves(runs: list[Run], name: str) -> list[Series]:
    return [series for run in runs if (series := run.series(name)) is not None]


def _wait_curves(runs: list[Run], part: int) -> list[Series]:
    """Return the seconds of waiting per step; `part` 0 is for teachers, 1 for rollouts."""
    curves = []
    for run in runs:
        if run.rows:
            points = [(row["step"], wait_seconds([row])[part]) for row in run.rows]
            curves.append(Series(run, *np.array(points, dtype=float).T))
    return curves


def _panel(plot: Plot, columns: int, small: bool) -> Panel:
    height = 2.0 if small else {1: 3.2, 2: 2.9, 3: 2.6}[columns]
    figure = Figure(figsize=(_PAGE_INCHES / columns, height), layout="constrained")
    axes = figure.add_subplot()
    _style_axes(axes, plot.axis)
    for curve in plot.curves:
        _draw_curve(axes, curve, plot.style)
    if any(curve.part for curve in plot.curves):
        axes.legend(fontsize=7, frameon=False, labelcolor=_INK)
    if plot.reference is not None:
        axes.axhline(plot.reference, color=_INK, linewidth=1, linestyle=":")
    cropped = plot.style == "noisy" and _crop_spikes(axes, plot.curves)
    about = plot.about + (" The highest spikes are cropped." if cropped else "")
    ends = ", ".join(f"{_curve_name(c)} {c.values[0]:.3g} to {c.values[-1]:.3g}" for c in plot.curves)
    label = f"Line chart of {plot.title.lower()} over training steps, from first to last: {ends}."
    return Panel(plot.title, about, as_svg(figure, label))


def _curve_name(curve: Series) -> str:
    return f"{curve.run.label}, {curve.part}" if curve.part else curve.run.label


def _style_axes(axes: Axes, axis: str) -> None:
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
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
    else:
        form = "{:,.6g}" if axis == "count" else "{:.4g}"
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: form.format(value)))


def _draw_curve(axes: Axes, curve: Series, style: str) -> None:
    style_options: dict[str, Any] = {"color": curve.run.color, "linestyle": curve.run.dash, "linewidth": 1.6}
    if curve.part:
        style_options |= {"linestyle": _PART_LINES[curve.place % len(_PART_LINES)], "label": _curve_name(curve)}
    if style == "points":
        style_options |= {"marker": _MARKERS[curve.run.index % len(_MARKERS)], "markersize": 4, "markeredgewidth": 0}
    elif len(curve.steps) == 1:
        style_options |= {"marker": "o", "markersize": 4}
    values = curve.values
    if style == "noisy" and _window(curve) > 1:
        axes.plot(*_downsample(curve.steps, values), color=curve.run.color, linewidth=0.8, alpha=0.22)
        values = _running_mean(values, _window(curve))
    axes.plot(*_downsample(curve.steps, values), **style_options)
    if style == "points":
        best = curve.steps == curve.run.best_step
        axes.plot(
            curve.steps[best], values[best], "o", markersize=10, markeredgecolor=curve.run.color, fillstyle="none"
        )


def _window(curve: Series) -> int:
    """Return the number of steps averaged into one point: odd, and 1 for short runs."""
    return 2 * round(len(curve.steps) * SMOOTHED_SHARE / 2) + 1


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Return the centered running mean.

    At the start the window grows from one value, so that a steep start is not flattened. At the end the window keeps
    its left half, so that the last value is still a mean and not the noise of one step.
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    before = np.minimum(index, window // 2)
    after = np.minimum(before, index[::-1])
    return (sums[index + after + 1] - sums[index - before]) / (before + after + 1)


def _downsample(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest and the highest point of each interval, to draw long runs with few points."""
    if len(steps) <= _RAW_POINTS:
        return steps, values
    parts = np.array_split(np.arange(len(steps)), _RAW_POINTS // 2)
    kept = np.unique([part[pick(values[part])] for part in parts for pick in (np.argmin, np.argmax)])
    kept = np.unique(np.concatenate([[0], kept, [len(steps) - 1]]))
    return steps[kept], values[kept]


def _crop_spikes(axes: Axes, curves: list[Series]) -> bool:
    """Crop rare spikes that would flatten the curves; return whether there were any."""
    values = np.concatenate([curve.values for curve in curves])
    low, high = min(values.min(), 0), np.quantile(values, 0.99)
    if high <= low or values.max() < 3 * (high - low) + low:
        return False
    axes.set_ylim(low - 0.05 * (high - low), low + 1.25 * (high - low))
    return True


def as_svg(figure: Figure, label: str) -> Markup:
    """Return `figure` as inline SVG with real text, scaled to its container, without metadata."""
    buffer = io.StringIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": label, "text.parse_math": False, "axes.unicode_minus": True}
    with matplotlib.rc_context(settings):
        FigureCanvasSVG(figure).print_svg(buffer)
    text = buffer.getvalue()
    box = re.search(r'viewBox="[^"]+"', text)
    assert box is not None
    body = re.sub(r"<metadata>.*?</metadata>", "", text[text.index(">", box.end()) + 1 :], flags=re.DOTALL)
    # The ids of groups are removed, because they would repeat in every figure of the page.
    body = re.sub(r"\n\s*", "\n", re.sub(r'<g id="[^"]*"', "<g", body))
    return Markup(f'<svg {box[0]} role="img" aria-label="{escape(label)}">') + Markup(body)
