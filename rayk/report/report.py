"""`report.html`: what a run did, or how several compare, as one page that needs neither network nor script.

Read from the run directories alone (`config.yaml`, `metrics.jsonl`, `summary.json`), so old runs can be reported at any
time and unfinished ones as far as they got. `report.html.j2` holds the page, this file what stands in it.
"""

import importlib.metadata
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from rayk.errors import InputError
from rayk.report.figures import SMOOTHED_SHARE, draw_figures
from rayk.report.run_directory import Run, duration, flattened, last_part, read_runs, teachers_of
from rayk.report.timeline import draw_timelines


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


def _page(runs: list[Run]) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["duration"] = duration
    source = resources.files("rayk.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        title=_listed([run.label for run in runs]) if len(runs) <= 3 else f"{len(runs)} runs compared",
        sentence=_sentence(runs),
        runs=runs,
        summaries_of_methods={
            run.method: run.summary["about"] for run in runs if run.summary and "about" in run.summary
        },
        columns=_columns(runs),
        table=_table(runs),
        support=_support(runs),
        measured=any(run.metrics.keys() & {column.metric for column in COLUMNS} for run in runs),
        figures=draw_figures(runs) + draw_timelines(runs),
        smoothed=f"{SMOOTHED_SHARE:.0%}",
        samples=_samples(runs),
        writings=[_writing(run) for run in runs if run.synthesis is not None],
        retrievers=[_retrieving(run) for run in runs if run.retriever is not None],
        differences=_differences(runs),
        configs=[yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) for run in runs],
        version=importlib.metadata.version("rayk"),
        written=datetime.now().astimezone(),
    )


def _sentence(runs: list[Run]) -> str:
    """What was done, for someone who sees the page first."""
    # A student that goes on learning from round to round is one.
    trained_here = {str(Path(run.config["output"]) / "model") for run in runs if "output" in run.config}
    began = [run for run in runs if (run.config.get("student") or {}).get("model") not in trained_here]
    students = list(dict.fromkeys(_student(run) for run in began or runs))
    teachers = list(dict.fromkeys(run.teacher_name for run in runs if run.teacher_name))
    steps = sorted({run.steps for run in runs})
    lasted = f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
    text = f"{_listed(students)} {'were' if len(students) > 1 else 'was'} trained "
    text += f"in {len(runs)} runs of {lasted} steps" if len(runs) > 1 else f"for {lasted} steps"
    text += _rows_read(runs, "train", " on {} rows")
    methods = list(dict.fromkeys(run.method for run in runs))
    text += f" with the method{'s' * (len(methods) > 1)} {_listed(methods)}"
    text += _rows_read(runs, "evaluation", " and measured on {} held-out rows")
    if teachers:
        text += f"; the teacher{'s are' if len(teachers) > 1 else ' is'} {_listed(f'“{name}”' for name in teachers)}"
    return f"{text[0].upper()}{text[1:]}."


def _student(run: Run) -> str:
    student = run.config.get("student") or {}
    if student.get("model"):
        return last_part(student["model"])
    shape = student.get("config")
    return f"a new {shape.get('model_type', '')} model" if isinstance(shape, dict) else f"a new {last_part(shape)}"


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
        "accuracy", "Accuracy", "Share of the evaluation prompts answered correctly. The ± is one standard error: "
        "differences below about three times that may be chance.", "{:.1%}", max,
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
    _metric(
        "preference_accuracy", "Prefers rightly", "Share of the evaluation pairs whose chosen answer, as a "
        "whole, is likelier to the student than the rejected one. Half is chance.", "{:.1%}", max,
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


def _columns(runs: list[Run]) -> list[Column]:
    """Those that were measured, of a student or a teacher."""
    by_teachers = [metrics for _, metrics in teachers_of(runs)]
    return [
        column for column in COLUMNS
        if any(column.of(run) is not None for run in runs) or any(column.metric in metrics for metrics in by_teachers)
    ]  # fmt: skip


def _table(runs: list[Run]) -> list[Line]:
    columns = _columns(runs)
    lines = [Line("Teacher", None, [_cell(metrics.get(c.metric or ""), c, run) for c in columns])
             for run, metrics in teachers_of(runs)]  # fmt: skip
    if len(lines) > 1:
        lines = [Line(f"Teacher {run.teacher_name}", None, line.cells)
                 for line, (run, _) in zip(lines, teachers_of(runs), strict=True)]  # fmt: skip
    students = [Line(run.label, run, [_cell(column.of(run), column, run) for column in columns]) for run in runs]
    finished = [line for line in students if line.run and line.run.summary is not None]
    for place, column in enumerate(columns):
        values = {line.cells[place].text: column.of(line.run) for line in finished if line.run}
        known = {text: value for text, value in values.items() if value is not None and math.isfinite(value)}
        if len(known) > 1:
            best = column.form.format(column.better(known.values()))
            for line in finished:
                line.cells[place].best = line.cells[place].text == best
    return lines + students


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
        f"Both divergences compare the teacher's {likeliest} likeliest tokens one by one and all others as one, so "
        "they are at most the full ones."
    )


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


@dataclass(frozen=True)
class Writing:
    """What a teacher wrote for a run: in a sentence, in numbers, and some examples."""

    run: Run
    sentence: str
    figures: list[tuple[str, str]]
    examples: list[dict[str, Any]]
    """With `rejected_by` empty for those that were kept."""


def _writing(run: Run) -> Writing:
    summary = run.synthesis
    assert summary is not None
    candidates, usage = summary["candidates"], summary["usage"]
    given = f" for {summary['prompts']:,} prompts" if summary["prompts"] else ""
    figures = [("kept", _share_of(summary["kept"], candidates))]
    figures += [(f"rejected: {by}", _share_of(count, candidates)) for by, count in summary["rejected"].items()]
    figures += [(each["name"], figure_text(each)) for each in summary["figures"]]
    counted = [name for name in ("requests", "prompt_tokens", "completion_tokens") if name in usage]
    figures += [(name.replace("_", " "), f"{usage[name]:,}") for name in counted]
    if "cost" in usage:
        figures.append(("cost, in the currency of the prices", f"{usage['cost']:,.4f}"))
    return Writing(
        run,
        f"{last_part(summary['teacher']['model'])} wrote{given}: {summary['about']} ({summary['paper']}).",
        figures,
        summary["examples"]["kept"] + summary["examples"]["rejected"],
    )


def figure_text(figure: Mapping[str, Any]) -> str:
    """A figure of a recipe: a share, a count, or a mean."""
    value = figure["value"]
    if figure["share"]:
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


@dataclass(frozen=True)
class Retrieving:
    """How well a run finds demonstrations: in a sentence and in numbers."""

    run: Run
    sentence: str
    figures: list[tuple[str, str]]


def _retrieving(run: Run) -> Retrieving:
    summary = run.retriever
    assert summary is not None
    held_out, gain = summary["held_out"], summary["held_out"]["learned_over_bm25"]
    after = {"random": "random ones", "bm25": "the nearest by BM25", "learned": "those of the retriever"}
    figures = [(f"after {after[what]}", f"{value:.3f}") for what, value in held_out["mean_logprob"].items()]
    error = "" if gain["standard_error"] is None else f" ± {gain['standard_error']:.3f}"
    figures.append(("the retriever over BM25 (± one standard error)", f"{gain['mean']:+.3f}{error}"))
    for each in summary["rounds"]:
        text = f"{each['candidates']:,} candidates"
        text += f" ({each['refused']:,} refused for their label)" if each["refused"] else ""
        figures.append((f"round {each['round']}", f"{text}; {each['mean_logprob']:.3f} after it"))
    learned = f"{last_part(summary['encoder'])} learned from {last_part(summary['teacher'])}"
    through = f" through the reward model {last_part(summary['reward_model'])}" if summary["reward_model"] else ""
    return Retrieving(
        run,
        f"{learned}{through}, on {summary['queries']:,} rows, which of {summary['pool']:,} demonstrations help. "
        f"Below, how likely the right answers of {held_out['rows']:,} held-out rows are to that teacher after "
        "demonstrations: mean log-probability, in nats a token; higher is better, 0 is certainty.",
        figures,
    )


def _share_of(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.1%})" if whole else f"{part:,}"


def _differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Settings in which the runs differ, a text for each run. One that is null is as good as one that is missing."""
    flat = [flattened({k: v for k, v in run.config.items() if k not in ("name", "output")}) for run in runs]
    different = []
    for name in dict.fromkeys(key for settings in flat for key in settings):
        values = [settings.get(name) for settings in flat]
        if any(value != values[0] for value in values):
            different.append((name, [_setting(value) for value in values]))
    return different


def _setting(value: Any) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _listed(items: Iterable[str]) -> str:
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
