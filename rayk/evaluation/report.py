"""`report.html`: what a run did, or how several compare, as one page that needs neither network nor script.

Read from the run directories alone (`config.yaml`, `metrics.jsonl`, `summary.json`), so old runs can be reported at any
time and unfinished ones as far as they got. `report.html.j2` holds the page, this file what stands in it.
"""

import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

import rayk
from rayk.errors import InputError
from rayk.methods import METHODS
from rayk.training.recorder import read_lines

_COLOURS = ("#2f6db5", "#d9730d", "#2c8a63", "#b23a6f", "#7358b5", "#8a6a3b", "#1e98b0", "#6b7280")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_INK, _GRID = "#5b6470", "#e6e8eb"
_PAGE_INCHES = 10.6
_RAW_POINTS = 400
_SMOOTHED_SHARE = 1 / 25


def write_report(runs: Sequence[Path], path: Path) -> None:
    """Write the report of `runs` (run directories; several are compared) to the HTML file `path`.

    Raises:
        InputError: a folder is no run directory, or `path` cannot be written.
    """
    if not runs:
        raise InputError("A report needs at least one run directory.")
    page = _page(read_runs(runs))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(page, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise InputError(f"The report '{path}' cannot be written: {error.strerror}.") from error


@dataclass(frozen=True)
class Run:
    """One run directory as it stands, with its look in every figure."""

    path: Path
    label: str
    place: int
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    summary: dict[str, Any] | None

    @property
    def colour(self) -> str:
        return _COLOURS[self.place % len(_COLOURS)]

    @property
    def dash(self) -> str:
        """Beyond the palette, colours come again as dashed lines."""
        return "-" if self.place < len(_COLOURS) else "--"

    @property
    def method(self) -> str:
        return str(self.config["method"]["kind"])

    @property
    def steps(self) -> int:
        return self.rows[-1]["step"] if self.rows else 0

    @cached_property
    def metrics(self) -> Mapping[str, float]:
        """The student's evaluation: the final one, or the latest of an unfinished run."""
        if self.summary is not None:
            return self.summary["student"]
        for row in reversed(self.rows):
            found = {name.removeprefix("evaluation_"): row[name] for name in row if name.startswith("evaluation_")}
            if found:
                return {**found, "step": row["step"]}
        return {}

    @property
    def tokens(self) -> int:
        return sum(row["tokens"] for row in self.rows)

    @property
    def training_seconds(self) -> float:
        return sum(row["step_seconds"] for row in self.rows)

    @property
    def teacher_name(self) -> str | None:
        for teacher in self.config.get("teachers") or []:
            return _basename(teacher.get("model") or teacher.get("name"))
        return None

    @property
    def status(self) -> str | None:
        """What is missing of an unfinished run."""
        if self.summary is not None:
            return None
        total = (self.config.get("training") or {}).get("steps")
        text = f"unfinished: step {self.steps:,}" + (f" of {total:,}" if total else "")
        return text + (f", measured at step {self.metrics['step']:,}" if self.metrics else ", not measured yet")

    def series(self, name: str) -> "Series | None":
        """Column `name` over the steps that have it."""
        points = [(row["step"], row[name]) for row in self.rows if isinstance(row.get(name), int | float)]
        points = [(step, value) for step, value in points if math.isfinite(value)]
        return Series(self, *np.array(points, dtype=float).T) if points else None


@dataclass(frozen=True, eq=False)
class Series:
    """One run's curve: float [points] each."""

    run: Run
    steps: np.ndarray
    values: np.ndarray


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in `paths`, with labels that tell them apart.

    Raises:
        InputError: a folder is no run directory.
    """
    configs = [_read_config(path) for path in paths]
    names = [str(config["name"]) for config in configs]
    runs = []
    for place, (path, config, name) in enumerate(zip(paths, configs, names, strict=True)):
        folder = path.absolute().name
        unique = [other.absolute().name for other in paths].count(folder) == 1
        label = name if names.count(name) == 1 else f"{name} ({folder if unique else path})"
        runs.append(Run(path, label, place, config, read_lines(path / "metrics.jsonl"), _read_summary(path)))
    return runs


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.yaml"
    if not file.is_file():
        why = "has no config.yaml" if path.is_dir() else "does not exist"
        raise InputError(f"'{path}' is no run directory of rayk: it {why}; give the output folder of a run.")
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"'{file}' cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(config, dict) or "name" not in config or "kind" not in (config.get("method") or {}):
        raise InputError(f"'{file}' is no config of a run; give the output folder of a run.")
    return config


def _read_summary(path: Path) -> dict[str, Any] | None:
    file = path / "summary.json"
    if not file.exists():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"'{file}' cannot be read: {error}; remove it to report the run as unfinished.") from error


def _page(runs: list[Run]) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["duration"] = _duration
    source = resources.files("rayk.evaluation").joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        title=_listed([run.label for run in runs]) if len(runs) <= 3 else f"{len(runs)} runs compared",
        sentence=_sentence(runs),
        runs=runs,
        summaries_of_methods={run.method: METHODS[run.method].summary for run in runs if run.method in METHODS},
        columns=COLUMNS,
        table=_table(runs),
        support=_support(runs),
        figures=_figures(runs),
        smoothed=f"{_SMOOTHED_SHARE:.0%}",
        samples=_samples(runs),
        differences=_differences(runs),
        configs=[yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) for run in runs],
        version=rayk.__version__,
        written=datetime.now().astimezone(),
    )


def _sentence(runs: list[Run]) -> str:
    """What was done, for someone who sees the page first."""
    students = list(dict.fromkeys(_student(run) for run in runs))
    teachers = list(dict.fromkeys(run.teacher_name for run in runs if run.teacher_name))
    steps = sorted({run.steps for run in runs})
    lasted = f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
    text = f"{_listed(students)} {'were' if len(students) > 1 else 'was'} trained "
    text += f"in {len(runs)} runs of {lasted} steps" if len(runs) > 1 else f"for {lasted} steps"
    text += _rows_read(runs, "train", " on {} rows")
    text += f" by {_listed(dict.fromkeys(run.method for run in runs))}"
    text += _rows_read(runs, "evaluation", " and measured on {} held-out rows")
    if teachers:
        text += f"; the teacher{'s are' if len(teachers) > 1 else ' is'} {_listed(f'“{name}”' for name in teachers)}"
    return f"{text[0].upper()}{text[1:]}."


def _student(run: Run) -> str:
    student = run.config.get("student") or {}
    if student.get("model"):
        return _basename(student["model"])
    shape = student.get("config")
    return f"a new {shape.get('model_type', '')} model" if isinstance(shape, dict) else f"a new {_basename(shape)}"


def _rows_read(runs: list[Run], part: str, form: str) -> str:
    counts = sorted({run.summary["rows"][part] for run in runs if run.summary} - {0})
    return form.format(" or ".join(f"{count:,}" for count in counts)) if counts else ""


@dataclass(frozen=True)
class Column:
    """One number of the final table and what it means."""

    heading: str
    about: str
    form: str
    better: Callable[[Iterable[float]], float]
    of: Callable[[Run], float | None]
    metric: str | None = None
    """The teacher's entry, where it has one."""

    @property
    def hint(self) -> str:
        return "higher is better" if self.better is max else "lower is better"


@dataclass
class Cell:
    """One formatted number; `best` among the finished students."""

    text: str = "–"
    note: str = ""
    best: bool = False


@dataclass(frozen=True)
class Line:
    """A row of the final table; the teacher's has no run."""

    name: str
    run: Run | None
    cells: list[Cell] = field(default_factory=list)


def _metric(name: str, heading: str, about: str, form: str, better: Callable[[Iterable[float]], float]) -> Column:
    return Column(heading, about, form, better, lambda run: run.metrics.get(name), name)


COLUMNS = (
    _metric(
        "accuracy", "Accuracy", "Share of the evaluation prompts answered correctly. The ± is one standard error: two "
        "results closer than that may differ by chance.", "{:.1%}", max,
    ),
    _metric(
        "loss", "Loss", "How surprised the model is by each token of the reference texts (cross-entropy, in nats a "
        "token). 0 is perfect foresight; 0.69 is a coin toss between two tokens.", "{:.3f}", min,
    ),
    _metric(
        "forward_kl", "Forward KL to teacher", "How much the student misses of what the teacher holds likely: "
        "KL(teacher‖student), in nats a token. 0 means that both predict the same.", "{:.4f}", min,
    ),
    _metric(
        "reverse_kl", "Reverse KL to teacher", "How much the student believes in what the teacher holds unlikely: "
        "KL(student‖teacher), in nats a token. 0 means that both predict the same.", "{:.4f}", min,
    ),
    _metric(
        "agreement", "Agreement", "Share of the tokens at which the student's first choice is the teacher's.",
        "{:.1%}", max,
    ),
    Column(
        "Tokens/s", "Training speed: tokens of training rows a second, waiting included.", "{:,.0f}", max,
        lambda run: run.tokens / run.training_seconds if run.training_seconds else None,
    ),
    Column(
        "Teacher wait", "Share of the training time in which the student stood still until its next batch, with what "
        "the teacher says about it, had come.", "{:.1%}", min,
        lambda run: _ratio(sum(row["teacher_wait_seconds"] for row in run.rows), run.training_seconds),
    ),
)  # fmt: skip


def _table(runs: list[Run]) -> list[Line]:
    lines = [Line("Teacher", None, [_cell(metrics.get(c.metric or ""), c, run) for c in COLUMNS])
             for run, metrics in _teachers(runs)]  # fmt: skip
    if len(lines) > 1:
        lines = [Line(f"Teacher {run.teacher_name}", None, line.cells)
                 for line, (run, _) in zip(lines, _teachers(runs), strict=True)]  # fmt: skip
    students = [Line(run.label, run, [_cell(column.of(run), column, run) for column in COLUMNS]) for run in runs]
    finished = [line for line in students if line.run and line.run.summary is not None]
    for place, column in enumerate(COLUMNS):
        values = {line.cells[place].text: column.of(line.run) for line in finished if line.run}
        known = {text: value for text, value in values.items() if value is not None and math.isfinite(value)}
        if len(known) > 1:
            best = column.form.format(column.better(known.values()))
            for line in finished:
                line.cells[place].best = line.cells[place].text == best
    return lines + students


def _teachers(runs: list[Run]) -> list[tuple[Run, Mapping[str, float]]]:
    """Each measured teacher once, with the run that measured it."""
    found: dict[str | None, tuple[Run, Mapping[str, float]]] = {}
    for run in runs:
        if run.summary and run.summary["teacher"]:
            found.setdefault(run.teacher_name, (run, run.summary["teacher"]))
    return list(found.values())


def _cell(value: float | None, column: Column, run: Run) -> Cell:
    if value is None or not math.isfinite(value):
        return Cell()
    return Cell(column.form.format(value), _error(value, run) if column.metric == "accuracy" else "")


def _error(accuracy: float, run: Run) -> str:
    """One standard error of a share."""
    asked = ((run.config.get("evaluation") or {}).get("generation") or {}).get("rows") or math.inf
    count = min(asked, run.summary["rows"]["evaluation"] if run.summary else math.inf)
    error = math.sqrt(max(accuracy * (1 - accuracy), 0) / count) if 0 < count < math.inf else 0
    return f"± {error:.1%}" if error else ""


def _support(runs: list[Run]) -> str:
    """On what the divergences were taken."""
    supports = [(run.config.get("evaluation") or {}).get("support") or {} for run in runs]
    sizes = sorted({support["k"] for support in supports if support.get("k")})
    if not sizes or not any("forward_kl" in run.metrics for run in runs):
        return ""
    likeliest = " or ".join(f"{k:,}" for k in sizes)
    return (
        f"Both divergences compare the teacher's {likeliest} likeliest tokens one by one and all others as one, so they "
        "are at most the full ones."
    )


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


def _figures(runs: list[Run]) -> list[Group]:
    """The figures that the runs have data for."""
    groups = [
        ("Training loss", 2, _loss_plots(runs)),
        ("Measured on held-out rows during training", 3, _evaluation_plots(runs)),
        ("Speed", 2, [
            Plot("Tokens per second", "Training rows' tokens, padding not counted.",
                 _curves(runs, "tokens_per_second"), axis="count"),
            Plot("Waiting for the teacher", "Seconds each step stood still for its batch.",
                 _curves(runs, "teacher_wait_seconds")),
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
            columns = min(most, len(plots))
            found.append(Group(title, columns, [_panel(plot, columns, title == "Optimiser") for plot in plots]))
    return found


def _loss_plots(runs: list[Run]) -> list[Plot]:
    """Cross-entropy of all runs on one axis; each other objective on its own, since their units do not compare."""
    plots = [
        Plot("Cross-entropy", "On the training rows' own tokens, in nats: the one loss that all methods share.",
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
    return plots


def _objective(run: Run) -> str:
    """What a run minimises, in words."""
    settings = _flat({k: v for k, v in run.config["method"].items() if k not in ("kind", "teacher", "support")})
    parts = [
        f"{name.removesuffix('.name').replace('_', ' ').replace('.', ' ')} {value}"
        for name, value in settings.items() if value is not None and value is not False
    ]  # fmt: skip
    return f"What {run.method} minimises" + (f" ({', '.join(parts)})" if parts else "")


def _evaluation_plots(runs: list[Run]) -> list[Plot]:
    teachers = _teachers(runs)
    reference = teachers[0][1].get("loss") if len(teachers) == 1 else None
    plots = [
        Plot("Loss", "Cross-entropy, nats a token." + (" Dotted: the teacher's." if reference is not None else ""),
             _curves(runs, "evaluation_loss"), style="points", reference=reference),
        Plot("Forward KL to teacher", "Nats a token; 0 is the teacher itself.",
             _curves(runs, "evaluation_forward_kl"), style="points"),
        Plot("Agreement with teacher", "Same first choice of token.",
             _curves(runs, "evaluation_agreement"), style="points", axis="share"),
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
    return Panel(plot.title, about, _svg(figure, label))


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
    return 2 * round(len(curve.steps) * _SMOOTHED_SHARE / 2) + 1


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


def _svg(figure: Figure, label: str) -> Markup:
    """`figure` for a page: its text as text, scaled to its place, without what only files need."""
    buffer = io.StringIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": label, "text.parse_math": False, "axes.unicode_minus": True}
    with matplotlib.rc_context(settings):
        FigureCanvasSVG(figure).print_svg(buffer)
    text = buffer.getvalue()
    box = re.search(r'viewBox="[^"]+"', text)
    assert box is not None
    body = re.sub(r"<metadata>.*?</metadata>", "", text[text.index(">", box.end()) + 1 :], flags=re.DOTALL)
    body = re.sub(r"\n\s*", "\n", body)
    return Markup(f'<svg {box[0]} role="img" aria-label="{escape(label)}">') + Markup(body)


@dataclass(frozen=True)
class Sample:
    """One prompt with everyone's answer; `answers` holds one entry a run, None where it kept none."""

    where: str
    prompt: str
    truth: str
    teacher: str | None
    answers: list[dict[str, Any] | None]


def _samples(runs: list[Run]) -> list[Sample]:
    """The kept answers of all runs, side by side by the row they answer."""
    kept = [{answer["where"]: answer for answer in (run.summary or {}).get("samples", [])} for run in runs]
    samples = []
    for where in dict.fromkeys(place for answers in kept for place in answers):
        answers = [answers.get(where) for answers in kept]
        found = [answer for answer in answers if answer is not None]
        teacher = next((answer["teacher"] for answer in found if answer.get("teacher") is not None), None)
        samples.append(Sample(where, found[0]["prompt"], found[0]["truth"], teacher, answers))
    return samples


def _differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Settings in which the runs differ, a text for each run."""
    flat = [_flat({k: v for k, v in run.config.items() if k not in ("name", "output")}) for run in runs]
    missing = object()
    different = []
    for name in dict.fromkeys(key for settings in flat for key in settings):
        values = [settings.get(name, missing) for settings in flat]
        if any(value != values[0] for value in values):
            different.append((name, ["–" if value is missing else _setting(value) for value in values]))
    return different


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"a.b.0": value}."""
    if not isinstance(values, dict | list) or not values:
        return {prefix: values}
    items = values.items() if isinstance(values, dict) else enumerate(values)
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _basename(model: Any) -> str:
    return str(model).rstrip("/").rsplit("/", 1)[-1]


def _listed(items: Iterable[str]) -> str:
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"
