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
from rayk.run.inputs import contamination_prompts, build_row_filters, synthesized_rows_path
from rayk.run.applications import teacher_applications, serve_teachers, served_student_config
from rayk.run.progress import ProgressListener
from rayk.synthesis import RecipeContext, Prompt, CompletionStore, fingerprint, synthesize_rows
from rayk.teachers import Teacher, serve_teacher
from rayk.teachers.cache import SignalCache

_NOT_WRITTEN_WITH = ("prompts", "teacher", "referee", "seed_tasks")  # told by what is in them, not by where they are


@dataclass(frozen=True)
class RoundInfo:
    """Which of a run's rounds this is, from 0, and where the rows of the round before were written."""

    number: int = 0
    before: Path | None = None


FIRST_ROUND = RoundInfo()


def write_rows(
    config: RunConfig, prompts: Sequence[Prompt], stack: ExitStack, cache: SignalCache | None, listener: ProgressListener, *,
    settled: bool, round_info: RoundInfo = FIRST_ROUND,
) -> dict[str, Teacher]:  # fmt: skip
    """Have the training rows written, unless they are.

    Args:
        stack: holds the teachers that training needs too; the others come down at once, and so does the student.
        settled: rows are learned from already; prompts that were left unanswered are not asked again.

    Returns:
        The teachers that stay up, by name.
    """
    assert config.synthesis is not None
    asks_student = config.synthesis.asks_student(round_info.number)
    with CompletionStore(synthesized_rows_path(config).parent) as store, ExitStack() as staying, ExitStack() as leaving:
        store.claim(_made_with(config, prompts, round_info), PLACEMENT, CHOICE)
        if (summary := store.summary) and (settled or not _wants_more(store, summary)):
            return {}
        if round_info.before is not None:
            store.look_into(round_info.before)
        filters = build_row_filters(config)
        new = [each.name for each in config.teachers if each.name in config.synthesis_teachers and not each.attach]
        if new or asks_student:
            listener.stage(f"Bringing up {', '.join([*new, *['the student'] * asks_student])} on Ray Serve")
        applications = teacher_applications(config)
        needed = [name for name in config.synthesis_teachers if name not in config.synthesis_only_teachers]
        kept = serve_teachers(config, applications, staying, cache, needed)
        gone = serve_teachers(
            config, applications, leaving, cache, [n for n in config.synthesis_teachers if n not in needed]
        )
        student = leaving.enter_context(serve_teacher(served_student_config(config))) if asks_student else None
        running = kept | gone
        before = f", {len(store):,} completions are there" if len(store) else ""
        given = "" if config.synthesis.makes_prompts else f" for {len(prompts):,} prompts"
        listener.stage(f"Synthesising {config.synthesis.kind}{given}{before}")
        summary = synthesize_rows(
            config.synthesis, prompts, running[config.synthesis_teacher], store, filters, seed=config.seed,
            progress=partial(listener.progress, unit="completion"),
            company=RecipeContext(
                round_info.number, round_info.before, student, config.data.chat_template,
                running[config.referee] if config.referee != config.synthesis_teacher else None, running,
            ),
        )  # fmt: skip
        listener.stage(_came_to(summary))
        stack.enter_context(staying.pop_all())
        return kept


def _came_to(summary: Mapping[str, Any]) -> str:
    """How many rows there are, and what became of the others."""
    left_out = ", ".join(f"{count:,} {by}" for by, count in summary["rejected"].items() if count)
    rows = f"{summary['kept']:,} of {summary['candidates']:,} rows are kept"
    return f"{rows}; left out: {left_out}" if left_out else rows


def _wants_more(store: CompletionStore, summary: Mapping[str, Any]) -> bool:
    """Whether there is something to ask again: it was left unanswered, or its refusal was deleted."""
    return summary["unanswered"] > 0 or store.refusals < summary.get("refused", 0)


def _made_with(config: RunConfig, prompts: Sequence[Prompt], round_info: RoundInfo) -> dict[str, Any]:
    """What the written rows depend on."""
    assert config.synthesis is not None
    values = config.model_dump(mode="json")
    models = {
        teacher["name"]: {"model": teacher["model"] or teacher["name"], "engine": teacher["engine"]}
        for teacher in values["teachers"]
    }
    teachers = [models[name] for name in dict.fromkeys([config.synthesis_teacher, config.referee])]
    made_with = {
        "synthesis": {key: value for key, value in values["synthesis"].items() if key not in _NOT_WRITTEN_WITH},
        "seed": config.seed,
        "teachers": teachers if len(teachers) > 1 else teachers[0],
        "judges": [models[name] for name in config.judges],
        "prompts": fingerprint(prompts),
        "rows": fingerprint(prompts, whole=True),
        "compared": fingerprint(contamination_prompts(config)),
    }
    if round_info.number:
        made_with["round"] = round_info.number
    if config.synthesis.asks_student(round_info.number):
        assert config.student.model is not None
        weights = weights_fingerprint(config.student.model)
        made_with["student"] = {"weights": weights or config.student.model, "chat": config.data.chat_template}
    return made_with
