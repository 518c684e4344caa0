"""Having a run's training rows written, and what they depend on."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rayk.config import RunConfig
from rayk.models import weights_fingerprint
from rayk.run.directory import CHOICE, PLACEMENT
from rayk.run.inputs import compared_prompts, filters_of, written_rows
from rayk.run.serving import applications_of, serve_all, student_to_ask
from rayk.run.watching import Watcher
from rayk.synthesis import Company, Prompt, Store, fingerprint, synthesise
from rayk.teachers import Teacher, serve_teacher
from rayk.teachers.cache import SignalCache

_NOT_WRITTEN_WITH = ("prompts", "teacher", "referee", "seed_tasks")  # told by what is in them, not by where they are


@dataclass(frozen=True)
class RoundOf:
    """Which of a run's rounds this is, from 0, and where the rows of the round before were written."""

    number: int = 0
    before: Path | None = None


FIRST = RoundOf()


def write_rows(
    config: RunConfig, prompts: Sequence[Prompt], stack: ExitStack, cache: SignalCache | None, watcher: Watcher, *,
    settled: bool, round_of: RoundOf = FIRST,
) -> dict[str, Teacher]:  # fmt: skip
    """Have the training rows written, unless they are.

    Args:
        stack: holds the teachers that training needs too; the others come down at once, and so does the student.
        settled: rows are learned from already; prompts that were left unanswered are not asked again.

    Returns:
        The teachers that stay up, by name.
    """
    assert config.synthesis is not None
    asks_student = config.synthesis.asks_student(round_of.number)
    with Store(written_rows(config).parent) as store, ExitStack() as staying, ExitStack() as leaving:
        store.claim(_made_with(config, prompts, round_of), PLACEMENT, CHOICE)
        if (summary := store.summary) and (settled or not _wants_more(store, summary)):
            return {}
        if round_of.before is not None:
            store.look_into(round_of.before)
        filters = filters_of(config)
        new = [each.name for each in config.teachers if each.name in config.writers and not each.attach]
        if new or asks_student:
            watcher.stage(f"Bringing up {', '.join([*new, *['the student'] * asks_student])} on Ray Serve")
        applications = applications_of(config)
        needed = [name for name in config.writers if name not in config.only_writing]
        kept = serve_all(config, applications, staying, cache, needed)
        gone = serve_all(config, applications, leaving, cache, [n for n in config.writers if n not in needed])
        student = leaving.enter_context(serve_teacher(student_to_ask(config))) if asks_student else None
        running = kept | gone
        before = f", {len(store):,} completions are there" if len(store) else ""
        given = "" if config.synthesis.makes_prompts else f" for {len(prompts):,} prompts"
        watcher.stage(f"Synthesising {config.synthesis.kind}{given}{before}")
        summary = synthesise(
            config.synthesis, prompts, running[config.writer], store, filters, seed=config.seed,
            progress=partial(watcher.progress, unit="completion"),
            company=Company(
                round_of.number, round_of.before, student, config.data.chat_template,
                running[config.referee] if config.referee != config.writer else None, running,
            ),
        )  # fmt: skip
        watcher.stage(_came_to(summary))
        stack.enter_context(staying.pop_all())
        return kept


def _came_to(summary: Mapping[str, Any]) -> str:
    """How many rows there are, and what became of the others."""
    left_out = ", ".join(f"{count:,} {by}" for by, count in summary["rejected"].items() if count)
    rows = f"{summary['kept']:,} of {summary['candidates']:,} rows are kept"
    return f"{rows}; left out: {left_out}" if left_out else rows


def _wants_more(store: Store, summary: Mapping[str, Any]) -> bool:
    """Whether there is something to ask again: it was left unanswered, or its refusal was deleted."""
    return summary["unanswered"] > 0 or store.refusals < summary.get("refused", 0)


def _made_with(config: RunConfig, prompts: Sequence[Prompt], round_of: RoundOf) -> dict[str, Any]:
    """What the written rows depend on."""
    assert config.synthesis is not None
    values = config.model_dump(mode="json")
    models = {
        teacher["name"]: {"model": teacher["model"] or teacher["name"], "engine": teacher["engine"]}
        for teacher in values["teachers"]
    }
    teachers = [models[name] for name in dict.fromkeys([config.writer, config.referee])]
    made_with = {
        "synthesis": {key: value for key, value in values["synthesis"].items() if key not in _NOT_WRITTEN_WITH},
        "seed": config.seed,
        "teachers": teachers if len(teachers) > 1 else teachers[0],
        "judges": [models[name] for name in config.judges],
        "prompts": fingerprint(prompts),
        "rows": fingerprint(prompts, whole=True),
        "compared": fingerprint(compared_prompts(config)),
    }
    if round_of.number:
        made_with["round"] = round_of.number
    if config.synthesis.asks_student(round_of.number):
        assert config.student.model is not None
        weights = weights_fingerprint(config.student.model)
        made_with["student"] = {"weights": weights or config.student.model, "chat": config.data.chat_template}
    return made_with
