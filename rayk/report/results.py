"""The report's table of results: teacher, student before training, and trained student, with what each number means."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from rayk.report.run_directory import Run, measured_teachers, wait_seconds


@dataclass(frozen=True)
class Column:
    """One number of the table and its meaning."""

    heading: str
    about: str
    form: str
    best: Callable[[Iterable[float]], float] | None
    """`max` where higher is better, `min` where lower is; None where that is unknown."""
    value: Callable[[Run], float | None]
    metric: str | None = None
    """The name of the metric; None for numbers that only a training run has."""

    @property
    def hint(self) -> str:
        if self.best is None:
            return ""
        return "higher is better" if self.best is max else "lower is better"


@dataclass
class Cell:
    """One formatted number; `best` is true if it is the best of all finished students."""

    text: str = "–"
    note: str = ""
    best: bool = False


@dataclass(frozen=True)
class Line:
    """A row of the table; `kind` is "teacher", "before" (the student before training) or "student"."""

    name: str
    run: Run
    kind: str
    cells: list[Cell]


def _metric(
    name: str, heading: str, about: str, form: str, best: Callable[[Iterable[float]], float] | None
) -> Column:  # fmt: skip
    return Column(heading, about, form, best, lambda run: run.metrics.get(name), name)


COLUMNS = (
    _metric(
        "accuracy", "Accuracy", "Share of the evaluation prompts answered correctly. The ± is one standard error: "
        "differences below about three times that may be chance.", "{:.1%}", max,
    ),
    _metric(
        "rouge_l", "ROUGE-L", "Overlap of the generated with the reference answers: F of their longest common "
        "subsequence of words, from 0 to 1; the mean over the answered prompts.", "{:.3f}", max,
    ),
    _metric(
        "exact_match", "Exact match", "Share of the answers that equal a reference, ignoring case, punctuation and "
        "articles (SQuAD).", "{:.1%}", max,
    ),
    _metric(
        "f1", "F1", "F1 of the words that answer and reference share, ignoring case, punctuation and articles (SQuAD).",
        "{:.3f}", max,
    ),
    _metric(
        "stopped", "Ended", "Share of the answers that ended by themselves; the others were cut at "
        "evaluation.generation.max_new_tokens.", "{:.1%}", max,
    ),
    _metric(
        "loss", "Loss", "Cross-entropy on the reference texts, in nats per token: how surprised the model is by each "
        "token. 0 is perfect prediction; 0.69 is a coin toss between two tokens.", "{:.3f}", min,
    ),
    _metric(
        "forward_kl", "Forward KL to teacher", "KL(teacher‖student) in nats per token: large where the student misses "
        "what the teacher considers likely. 0 means equal predictions.", "{:.4f}", min,
    ),
    _metric(
        "reverse_kl", "Reverse KL to teacher", "KL(student‖teacher) in nats per token: large where the student "
        "considers likely what the teacher does not. 0 means equal predictions.", "{:.4f}", min,
    ),
    _metric(
        "agreement", "Agreement", "Share of the tokens for which student and teacher have the same most likely token.",
        "{:.1%}", max,
    ),
    _metric(
        "preference_accuracy", "Preference accuracy", "Share of the evaluation pairs whose chosen completion is more "
        "likely to the student than the rejected one. 50% is chance.", "{:.1%}", max,
    ),
    Column(
        "Tokens/s", "Training speed: tokens of training rows per second, including waiting.", "{:,.0f}", max,
        lambda run: _ratio(run.tokens, run.training_seconds),
    ),
    Column(
        "Teacher wait", "Share of the training time in which the student waited for the teacher's signals.",
        "{:.1%}", min, lambda run: _ratio(wait_seconds(run.rows)[0], run.training_seconds),
    ),
    Column(
        "Rollout wait", "Share of the training time in which the student waited for its own rollouts to be generated.",
        "{:.1%}", min, lambda run: _ratio(wait_seconds(run.rows)[1], run.training_seconds) or None,
    ),
)  # fmt: skip


def columns_of(runs: list[Run]) -> list[Column]:
    """Return the columns that have a value for any student or teacher; those of users' own metrics after the first."""
    measured = [metrics for _, metrics in measured_teachers(runs)] + [run.metrics_before for run in runs]
    own = dict.fromkeys(
        path for run in runs for path in (run.config.get("evaluation") or {}).get("metrics") or [] if ":" in path
    )
    columns = [*COLUMNS[:1], *map(_own_metric, own), *COLUMNS[1:]]
    return [
        column for column in columns
        if any(column.value(run) is not None for run in runs) or any(column.metric in metrics for metrics in measured)
    ]  # fmt: skip


def _own_metric(path: str) -> Column:
    name = path.rpartition(":")[2]
    return _metric(name, name, f"Mean of your metric {path} over the answered prompts.", "{:.4g}", None)


def result_lines(runs: list[Run]) -> list[Line]:
    """Return the rows: teachers, then each student before (if measured) and after training; mark the best cells."""
    columns, teachers = columns_of(runs), measured_teachers(runs)
    lines = [
        Line(f"Teacher {run.teacher_name}" if len(teachers) > 1 else "Teacher", run, "teacher",
             _metric_cells(metrics, columns, run))
        for run, metrics in teachers
    ]  # fmt: skip
    for run in runs:
        if run.metrics_before:
            name = f"{run.label}, before training"
            lines.append(Line(name, run, "before", _metric_cells(run.metrics_before, columns, run)))
        lines.append(Line(run.label, run, "student", [_cell(column.value(run), column, run) for column in columns]))
    _mark_best([line for line in lines if line.kind == "student" and line.run.summary is not None], columns)
    return lines


def _metric_cells(metrics: Mapping[str, float], columns: list[Column], run: Run) -> list[Cell]:
    return [_cell(metrics.get(column.metric or ""), column, run) for column in columns]


def _mark_best(finished: list[Line], columns: list[Column]) -> None:
    """Mark the best value of each column that has at least two different ones."""
    for index, column in enumerate(columns):
        if column.best is None:
            continue
        values = {line.cells[index].text: column.value(line.run) for line in finished}
        known = {text: value for text, value in values.items() if value is not None and math.isfinite(value)}
        if len(known) > 1:
            best = column.form.format(column.best(known.values()))
            for line in finished:
                line.cells[index].best = line.cells[index].text == best


def _cell(value: float | None, column: Column, run: Run) -> Cell:
    if value is None or not math.isfinite(value):
        return Cell()
    return Cell(column.form.format(value), _standard_error(value, run) if column.metric == "accuracy" else "")


def _standard_error(accuracy: float, run: Run) -> str:
    """Return the standard error of a share of the evaluated rows, with a ± sign; empty if it is not known."""
    rows = ((run.config.get("evaluation") or {}).get("generation") or {}).get("rows") or math.inf
    count = min(rows, run.summary["rows"]["evaluation"] if run.summary else math.inf)
    error = math.sqrt(max(accuracy * (1 - accuracy), 0) / count) if 0 < count < math.inf else 0
    return f"± {error:.1%}" if error else ""


def describe_support(runs: list[Run]) -> str:
    """Say on which part of the distributions the divergences were computed; empty if on all of it."""
    supports = [(run.config.get("evaluation") or {}).get("support") or {} for run in runs]
    sizes = sorted({support["k"] for support in supports if support.get("k")})
    if not sizes or not any("forward_kl" in run.metrics for run in runs):
        return ""
    likeliest = " or ".join(f"{k:,}" for k in sizes)
    return (
        f"Both divergences compare the teacher's {likeliest} most likely tokens one by one, and all other tokens as "
        "one outcome. They are lower bounds of the divergences over the whole vocabulary."
    )


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
