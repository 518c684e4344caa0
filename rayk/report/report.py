"""The report of one run, or the comparison of several, as one HTML page without scripts or network access.

Everything that rows, models and run directories contain is escaped, and the page's own policy forbids browsers to run
scripts or to load anything.

It is made from the run directories alone, so old runs can be reported at any time, and unfinished runs up to their last
step. `report.html.j2` is the template of the page; this file computes its contents.
"""

import importlib.metadata
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from rayk.errors import InputError
from rayk.report.figures import SMOOTHED_SHARE, draw_figures
from rayk.report.results import COLUMNS, columns_of, describe_support, result_lines
from rayk.report.run_directory import Run, duration, explain_odd_values, flatten, last_part, read_runs
from rayk.report.timeline import draw_timelines
from rayk.storage.atomic import disk_errors, write_whole

_ROLLOUTS_SHOWN = 12


def write_report(runs: Sequence[Path], path: Path) -> None:
    """Write the report of `runs` (run directories; several are compared) to the HTML file `path`.

    Raises:
        InputError: a folder is no run directory, or `path` cannot be written.
    """
    if not runs:
        raise InputError("A report needs at least one run directory.")
    with explain_odd_values(runs):
        page = _render(read_runs(runs))
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page.encode())


def _render(runs: list[Run]) -> str:
    samples = _samples(runs)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["duration"] = duration
    source = resources.files("rayk.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        title=_title(runs),
        sentence=_sentence(runs),
        runs=runs,
        summaries_of_methods={
            run.method: run.summary["about"] for run in runs if run.summary and "about" in run.summary
        },
        columns=columns_of(runs),
        lines=result_lines(runs),
        support=describe_support(runs),
        measured=any(run.metrics.keys() & {column.metric for column in COLUMNS} for run in runs),
        figures=draw_figures(runs) + draw_timelines(runs),
        smoothed=f"{SMOOTHED_SHARE:.0%}",
        samples=samples,
        marked=_marks_answers(runs, samples),
        rollouts=[(run, _select_rollouts(run)) for run in runs if run.rollouts],
        syntheses=[_synthesis(run) for run in runs if run.synthesis is not None],
        retrievers=[_retrieval(run) for run in runs if run.retriever is not None],
        differences=_differences(runs),
        configs=[yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) for run in runs],
        version=importlib.metadata.version("rayk"),
        written=datetime.now().astimezone(),
    )


def _title(runs: list[Run]) -> str:
    labels = [run.label for run in runs]
    if len(runs) == 1:
        return f"Report of {labels[0]}"
    return f"Comparison of {_enumerate(labels)}" if len(runs) <= 3 else f"Comparison of {len(runs)} runs"


def _sentence(runs: list[Run]) -> str:
    """Summarize the runs in one sentence for the top of the page."""
    # In a run with rounds, the student of a later round is the model of the round before, so it is counted once.
    trained_here = {str(Path(run.config["output"]) / "model") for run in runs if "output" in run.config}
    first_runs = [run for run in runs if (run.config.get("student") or {}).get("model") not in trained_here]
    students = list(dict.fromkeys(_student(run) for run in first_runs or runs))
    teachers = list(dict.fromkeys(run.teacher_name for run in runs if run.teacher_name))
    steps = sorted({run.steps for run in runs})
    count = f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
    text = f"{_enumerate(students)} {'were' if len(students) > 1 else 'was'} trained "
    text += f"in {len(runs)} runs of {count} steps" if len(runs) > 1 else f"for {count} step{'s' * (count != '1')}"
    text += _row_counts(runs, "train", " on {} rows")
    methods = list(dict.fromkeys(run.method for run in runs))
    text += f" with the method{'s' * (len(methods) > 1)} {_enumerate(methods)}"
    text += _row_counts(runs, "evaluation", " and evaluated on {} held-out rows")
    if teachers:
        names = _enumerate(f"“{name}”" for name in teachers)
        text += f"; the teacher{'s are' if len(teachers) > 1 else ' is'} {names}"
    # A model's name is not capitalized; only a phrase such as "a new llama model" is.
    return f"{text[0].upper()}{text[1:]}." if text.startswith("a new ") else f"{text}."


def _student(run: Run) -> str:
    student = run.config.get("student") or {}
    if student.get("model"):
        return f"“{last_part(student['model'])}”"
    shape = student.get("config")
    return f"a new {shape.get('model_type', '')} model" if isinstance(shape, dict) else f"a new {last_part(shape)}"


def _row_counts(runs: list[Run], part: str, form: str) -> str:
    counts = sorted({run.summary["rows"][part] for run in runs if run.summary} - {0})
    return form.format(" or ".join(f"{count:,}" for count in counts)) if counts else ""


@dataclass(frozen=True)
class Sample:
    """One evaluation prompt with all completions; `answers` has one entry per run, None if the run stored none."""

    where: str
    prompt: str
    truth: str
    teacher: str | None
    before: str | None
    """Completion of the student before training; None if it was not stored, or if runs have different ones."""
    answers: list[dict[str, Any] | None]


def _samples(runs: list[Run]) -> list[Sample]:
    """Return the stored sample completions of all runs, grouped by evaluation row."""
    kept = [{answer["where"]: answer for answer in (run.summary or {}).get("samples", [])} for run in runs]
    samples = []
    for where in dict.fromkeys(place for answers in kept for place in answers):
        answers = [answers.get(where) for answers in kept]
        found = [answer for answer in answers if answer is not None]
        teacher = next((answer["teacher"] for answer in found if answer.get("teacher") is not None), None)
        before = {answer.get("before") for answer in found}
        samples.append(
            Sample(
                where,
                found[0]["prompt"],
                found[0]["truth"],
                teacher,
                before.pop() if len(before) == 1 else None,
                answers,
            )
        )
    return samples


def _marks_answers(runs: list[Run], samples: list[Sample]) -> bool:
    """Return whether answers are right or wrong; free text that only has a reference is neither."""
    settings = [run.config.get("evaluation") or {} for run in runs]
    if any(setting.get("answer_field") or setting.get("answer_pattern") for setting in settings):
        return True
    return any(answer is not None and answer["correct"] for sample in samples for answer in sample.answers)


def _select_rollouts(run: Run) -> list[dict[str, Any]]:
    """Return some of the run's sampled rollouts, evenly spaced over the steps, including the first and the last."""
    rows = run.rollouts
    if len(rows) <= _ROLLOUTS_SHOWN:
        return rows
    return [rows[index * (len(rows) - 1) // (_ROLLOUTS_SHOWN - 1)] for index in range(_ROLLOUTS_SHOWN)]


@dataclass(frozen=True)
class Section:
    """A section of the page about one part of a run: a sentence, named numbers, and example rows."""

    run: Run
    sentence: str
    figures: list[tuple[str, str]]
    examples: list[dict[str, Any]]
    """Example rows; `rejected_by` is empty for a row that was kept."""


def _synthesis(run: Run) -> Section:
    """Describe how a run's training rows were generated."""
    summary = run.synthesis
    assert summary is not None
    candidates, usage = summary["candidates"], summary["usage"]
    prompts = f" for {summary['prompts']:,} prompts" if summary["prompts"] else ""
    figures = [("kept", _share(summary["kept"], candidates))]
    figures += [(f"rejected: {reason}", _share(count, candidates)) for reason, count in summary["rejected"].items()]
    figures += [(figure["name"], figure_text(figure)) for figure in summary["figures"]]
    counts = [name for name in ("requests", "prompt_tokens", "completion_tokens") if name in usage]
    figures += [(name.replace("_", " "), f"{usage[name]:,}") for name in counts]
    if "cost" in usage:
        figures.append(("cost, in the currency of the prices", f"{usage['cost']:,.4f}"))
    teacher = last_part(summary["teacher"]["model"])
    sentence = f"{teacher} generated rows{prompts}: {summary['about']} ({summary['paper']})."
    return Section(run, sentence, figures, summary["examples"]["kept"] + summary["examples"]["rejected"])


def figure_text(figure: Mapping[str, Any]) -> str:
    """Format a recipe's figure, which is a share, a count, or a mean."""
    value = figure["value"]
    if figure["share"]:
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def _retrieval(run: Run) -> Section:
    """Describe how helpful the demonstrations that a run's retriever finds are."""
    summary = run.retriever
    assert summary is not None
    held_out, gain = summary["held_out"], summary["held_out"]["learned_over_bm25"]
    names = {"random": "random ones", "bm25": "the nearest by BM25", "learned": "those of the retriever"}
    figures = [(f"after {names[choice]}", f"{value:.3f}") for choice, value in held_out["mean_logprob"].items()]
    error = "" if gain["standard_error"] is None else f" ± {gain['standard_error']:.3f}"
    figures.append(("gain of the retriever over BM25 (± one standard error)", f"{gain['mean']:+.3f}{error}"))
    for entry in summary["rounds"]:
        text = f"{entry['candidates']:,} candidates"
        text += f" ({entry['refused']:,} refused for their label)" if entry["refused"] else ""
        figures.append((f"round {entry['round']}", f"{text}; {entry['mean_logprob']:.3f} afterwards"))
    trained = f"{last_part(summary['encoder'])} was trained on scores of {last_part(summary['teacher'])}"
    reward = f" with the reward model {last_part(summary['reward_model'])}" if summary["reward_model"] else ""
    sentence = (
        f"{trained}{reward}, to find for each of {summary['queries']:,} rows the helpful ones of {summary['pool']:,} "
        f"demonstrations. The table shows the mean log-probability of the right answers of {held_out['rows']:,} "
        "held-out rows after their demonstrations, in nats per token: higher is better, 0 is certainty."
    )
    return Section(run, sentence, figures, [])


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.1%})" if whole else f"{part:,}"


def _differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Return the settings in which the runs differ, with a text per run. Null and missing settings count as equal."""
    flat = [flatten({k: v for k, v in run.config.items() if k not in ("name", "output")}) for run in runs]
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


def _enumerate(items: Iterable[str]) -> str:
    """Join items as in "a, b and c"."""
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last
