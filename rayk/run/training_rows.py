"""Synthesize a run's training rows, unless its directory contains them already."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rayk.config import RunConfig
from rayk.config.secrets import redact
from rayk.data.chat_template import read_template
from rayk.models import load_tokenizer, weights_fingerprint
from rayk.run.applications import serve_teachers, served_student_config, teacher_applications
from rayk.run.directory import PLACEMENT, SELECTION
from rayk.run.progress import ProgressListener
from rayk.run.synthesis_inputs import build_row_filters, contamination_prompts, synthesized_rows_path
from rayk.synthesis import CompletionStore, Prompt, RecipeContext, fingerprint, synthesize_rows
from rayk.teachers import Teacher, serve_teacher
from rayk.teachers.cache import SignalCache

# Settings that are compared by the contents of the file or model, not by its path or name.
_LOCATIONS = ("prompts", "teacher", "referee", "seed_tasks")


@dataclass(frozen=True)
class RoundInfo:
    """A round's number, from 0, and the synthesis folder of the round before."""

    number: int = 0
    before: Path | None = None


FIRST_ROUND = RoundInfo()


def synthesize_training_rows(
    config: RunConfig, prompts: Sequence[Prompt], stack: ExitStack, cache: SignalCache | None,
    listener: ProgressListener, *, settled: bool, round_info: RoundInfo = FIRST_ROUND,
) -> dict[str, Teacher]:  # fmt: skip
    """Synthesize the training rows, unless they are complete.

    Args:
        stack: removes, when it closes, the teachers that training needs too; other teachers and the served student are
            removed at the end of this function.
        settled: whether training on the rows has started; if so, failed requests are not repeated.

    Returns:
        The teachers that are still running, by name.
    """
    assert config.synthesis is not None
    uses_student = config.synthesis.queries_student(round_info.number)
    with (
        CompletionStore(synthesized_rows_path(config).parent) as store,
        ExitStack() as training_teachers,
        ExitStack() as synthesis_teachers,
    ):
        store.claim(_dependencies(config, prompts, round_info), PLACEMENT, SELECTION)
        if (summary := store.summary) and (settled or not _is_incomplete(store, summary)):
            return {}
        if round_info.before is not None:
            store.add_earlier_round(round_info.before)
        filters = build_row_filters(config)
        names = [t.name for t in config.teachers if t.name in config.synthesis_teachers and not t.attach]
        if names or uses_student:
            listener.stage(f"Starting {', '.join([*names, *['the student'] * uses_student])} on Ray Serve")
        applications = teacher_applications(config)
        needed = [name for name in config.synthesis_teachers if name not in config.synthesis_only_teachers]
        kept = serve_teachers(config, applications, training_teachers, cache, needed)
        others = [name for name in config.synthesis_teachers if name not in needed]
        running = kept | serve_teachers(config, applications, synthesis_teachers, cache, others)
        student = (
            synthesis_teachers.enter_context(serve_teacher(served_student_config(config))) if uses_student else None
        )
        count = "" if config.synthesis.makes_prompts else f" for {len(prompts):,} prompts"
        existing = f"; {len(store):,} completions exist already" if len(store) else ""
        listener.stage(f"Synthesizing {config.synthesis.kind}{count}{existing}")
        summary = synthesize_rows(
            config.synthesis, prompts, running[config.synthesis_teacher], store, filters, seed=config.seed,
            progress=partial(listener.progress, unit="completion"),
            context=RecipeContext(
                round_info.number, round_info.before, student, bool(config.data.chat_template),
                _student_template(config), config.data.chat_template_date,
                running[config.referee] if config.referee != config.synthesis_teacher else None, running,
            ),
        )  # fmt: skip
        listener.stage(_describe_rows(summary))
        stack.enter_context(training_teachers.pop_all())
        return kept


def _student_template(config: RunConfig) -> str | None:
    """Return the text of the template given as `data.chat_template`, in which the student generates."""
    name = config.student.tokenizer or config.student.model
    if not isinstance(config.data.chat_template, str) or name is None:
        return None
    return read_template(
        config.data.chat_template, load_tokenizer(name, trust_remote_code=config.student.trust_remote_code)
    )


def _describe_rows(summary: Mapping[str, Any]) -> str:
    """Describe the numbers of kept and rejected rows."""
    rejected = ", ".join(f"{count:,} {reason}" for reason, count in summary["rejected"].items() if count)
    text = f"{summary['kept']:,} of {summary['candidates']:,} rows are kept"
    return f"{text}; rejected: {rejected}" if rejected else text


def _is_incomplete(store: CompletionStore, summary: Mapping[str, Any]) -> bool:
    """Return whether requests should be repeated, because some failed or stored refusals were deleted."""
    return summary["unanswered"] > 0 or store.num_refusals < summary.get("refused", 0)


def _dependencies(config: RunConfig, prompts: Sequence[Prompt], round_info: RoundInfo) -> dict[str, Any]:
    """Return everything that the synthesized rows depend on."""
    assert config.synthesis is not None
    values = config.model_dump(mode="json")
    models = {
        teacher["name"]: {
            "model": teacher["model"] or teacher["name"],
            "engine": redact(teacher["engine"]),
            **({"chat_template_kwargs": variables} if (variables := teacher["chat_template_kwargs"]) else {}),
        }
        for teacher in values["teachers"]
    }
    teachers = [models[name] for name in dict.fromkeys([config.synthesis_teacher, config.referee])]
    values["synthesis"]["chat"] = config.synthesis.uses_chat(bool(config.data.chat_template))
    dependencies = {
        "synthesis": {key: redact(value) for key, value in values["synthesis"].items() if key not in _LOCATIONS},
        "seed": config.seed,
        "teachers": teachers if len(teachers) > 1 else teachers[0],
        "judges": [models[name] for name in config.judges],
        "prompts": fingerprint(prompts),
        "rows": fingerprint(prompts, whole=True),
        "compared": fingerprint(contamination_prompts(config)),
    }
    if round_info.number:
        dependencies["round"] = round_info.number
    if config.synthesis.queries_student(round_info.number):
        assert config.student.model is not None
        weights = weights_fingerprint(config.student.model)
        variables = config.data.chat_template_kwargs
        dependencies["student"] = {
            "weights": weights or config.student.model, "chat": config.data.chat_template,
            **({"chat_template_kwargs": variables} if variables else {}),
        }  # fmt: skip
    return dependencies
