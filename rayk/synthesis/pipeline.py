"""From prompts to training rows: generate candidates, filter them, write rows and summary."""

import datetime
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayk.config import CustomSynthesisConfig, SynthesisSettings
from rayk.errors import InputError, RaykError, RunFailed
from rayk.serving.event_loop import run_until_complete
from rayk.synthesis.base import Candidate, Recipe, Round
from rayk.synthesis.completions import CompletionClient
from rayk.synthesis.judging import Judge, apply_judge, find_judges
from rayk.synthesis.prompts import Prompt
from rayk.synthesis.recipes import find_recipe
from rayk.synthesis.rows import filter_fields, row_texts, summarize, training_row, why_no_rows
from rayk.synthesis.store import CompletionStore
from rayk.synthesis.usage import Progress, UsageTracker
from rayk.teachers import Teacher
from rayk.text import Filter, apply_filters
from rayk.text.functions import describe_error


@dataclass(frozen=True)
class RecipeContext:
    """Student, referee and judges that a recipe may query, and the round.

    Attributes:
        number, before: as in `Round`.
        student: the student as it is when the round begins.
        student_chats: whether the student reads rows in a chat template (`data.chat_template`); then the teachers do
            too, unless `synthesis.chat` is set.
        student_template: the text of that template; None: its tokenizer's own.
        template_date: the date that chat templates print which ask for today's; None: today.
        referee: None if it is the teacher.
        judges: teachers that `judge` filters name, by name.
    """

    number: int = 0
    before: Path | None = None
    student: Teacher | None = None
    student_chats: bool = False
    student_template: str | None = None
    template_date: datetime.date | None = None
    referee: Teacher | None = None
    judges: Mapping[str, Teacher] = field(default_factory=dict)


def synthesize_rows(
    settings: SynthesisSettings, prompts: Sequence[Prompt], teacher: Teacher, store: CompletionStore,
    filters: Sequence[Filter] = (), *, seed: int = 0, progress: Progress = lambda done, total, text: None,
    context: RecipeContext | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Generate training rows for `prompts` with `teacher`, and write them to `store`.

    Completions that the store contains are not requested again.

    Args:
        filters: the filters built from `settings.filters`.
        context: other models that the recipe may query.

    Returns:
        The content of `summary.json`.

    Raises:
        InputError: a setting does not fit the teacher, or a custom recipe fails.
        RunFailed: the teacher answers nothing, the disk is full, or all rows are rejected.
        TeacherUnavailable: as `Teacher.generate`.
    """
    context = context or RecipeContext()
    chats = context.student_chats or any(prompt.messages for prompt in prompts)
    clients = _open_clients(settings, teacher, store, seed, progress, context, chats)
    recipe = find_recipe(settings)(settings, prompts, clients["teacher"])
    recipe.round = Round(
        context.number, context.before, clients.get("student"), clients.get("referee", clients["teacher"])
    )
    judges = _open_judges(settings, teacher, store, seed, clients["teacher"].tracker, context)
    candidates = run_until_complete(_generate(recipe, list(clients.values())))
    row_filters, pool_filters = ([each for each in filters if each.compares_rows is which] for which in (False, True))
    candidates = _reject_duplicates(_filter(candidates, row_filters, prompts))
    for judge, client in judges:
        rows = [filter_fields(candidate, prompts) for candidate in candidates]
        candidates = run_until_complete(apply_judge(judge, candidates, rows, client, settings.in_flight))
    candidates = _select(recipe, candidates)
    # Filters that compare rows must only remember rows that are kept, so they come after the selection.
    candidates = _filter(candidates, pool_filters, prompts)
    accepted = [candidate for candidate in candidates if not candidate.rejected_by]
    rejected = [candidate for candidate in candidates if candidate.rejected_by]
    names = [each.name for each in row_filters] + [judge.name for judge, _ in judges]
    names += [each.name for each in pool_filters]
    summary = summarize(recipe, candidates, names)
    store.write_rows(
        *([training_row(each, prompts, keep_thoughts=settings.thoughts == "keep") for each in candidates]
          for candidates in (accepted, rejected))
    )  # fmt: skip
    if not accepted:
        raise RunFailed(why_no_rows(recipe, rejected))
    store.write_summary(summary)
    return summary


def _open_clients(
    settings: SynthesisSettings, teacher: Teacher, store: CompletionStore, seed: int, progress: Progress,
    context: RecipeContext, chats: bool,
) -> dict[str, CompletionClient]:  # fmt: skip
    """Return the clients by role: 'teacher', and 'student' and 'referee' if the recipe may query them.

    Args:
        chats: whether the student reads rows in a chat template.
    """
    tracker, prefers_chat = UsageTracker(store.usage, progress), chats and settings.prefers_chat
    date = context.template_date
    teacher_client = CompletionClient(teacher, store, settings, seed, tracker, prefers_chat=prefers_chat, date=date)
    clients = {"teacher": teacher_client}
    if context.student is not None:
        clients["student"] = CompletionClient(
            context.student, store, settings, seed, tracker, role="student",
            chat=chats and context.student.info.engine != "openai", template=context.student_template, date=date,
        )  # fmt: skip
    if context.referee is not None:
        chat = False if context.referee.info.engine == "openai" else settings.chat
        clients["referee"] = CompletionClient(
            context.referee, store, settings, seed, tracker, role="referee", chat=chat, prefers_chat=prefers_chat,
            date=date,
        )  # fmt: skip
    return clients


def _open_judges(
    settings: SynthesisSettings, teacher: Teacher, store: CompletionStore, seed: int, tracker: UsageTracker,
    context: RecipeContext,
) -> list[tuple[Judge, CompletionClient]]:  # fmt: skip
    """Return the judges among the filters, each with its client."""
    judges = []
    for judge in find_judges(settings.filters):
        model = teacher if judge.settings.teacher is None else context.judges[judge.settings.teacher]
        chat = judge.settings.chat and model.info.engine != "openai"
        client = CompletionClient(
            model, store, settings, seed, tracker, role="judge", chat=chat, date=context.template_date
        )
        judges.append((judge, client))
    return judges


async def _generate(recipe: Recipe, clients: Sequence[CompletionClient]) -> list[Candidate]:
    async with AsyncExitStack() as stack:
        for client in clients:
            await stack.enter_async_context(client)
        async with aclosing(recipe.candidates()) as candidates:
            if isinstance(recipe.settings, CustomSynthesisConfig):
                return await _generate_custom(recipe, candidates, recipe.settings)
            return [candidate async for candidate in candidates]


async def _generate_custom(recipe: Recipe, candidates: Any, settings: CustomSynthesisConfig) -> list[Candidate]:
    """Collect and check the candidates of a user's recipe.

    Raises:
        InputError: the recipe fails, or a candidate cannot become a row.
    """
    checked: list[Candidate] = []
    try:
        async for candidate in candidates:
            if problem := _candidate_problem(candidate, len(recipe.prompts), settings):
                raise InputError(f"Recipe '{settings.path}': candidate {len(checked) + 1} {problem}.")
            checked.append(candidate)
    except RaykError:
        raise
    except Exception as error:  # a user's code can raise anything
        raise InputError(f"Recipe '{settings.path}' failed with {describe_error(error)}.") from error
    return checked


def _candidate_problem(candidate: Any, num_prompts: int, settings: CustomSynthesisConfig) -> str:
    """Return why a candidate of a user's recipe cannot become a row; empty if it can."""
    if not isinstance(candidate, Candidate):
        return f"is a {type(candidate).__name__}; yield rayk.synthesis.Candidate objects"
    if candidate.prompt_index not in range(num_prompts):
        return f"has prompt_index {candidate.prompt_index!r}; give the index of one of the {num_prompts} prompts"
    if not candidate.responses:
        return "has no responses; give the completions that it was made from"
    if candidate.rejected_by:
        return ""
    texts = {"prompt": candidate.prompt, "completion": candidate.completion}
    if settings.pairs:
        texts["worse completion"] = candidate.worse or ""
    for name, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            return f"has no {name}; give one as text, or reject the candidate (see rayk.synthesis.completion_problem)"
    if not settings.pairs and candidate.worse is not None:
        return "has a worse completion; set synthesis.pairs: true"
    return ""


def _reject_duplicates(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Reject candidates whose prompt and completion equal those of an earlier one."""
    seen: set[tuple[str, ...]] = set()
    checked = []
    for candidate in candidates:
        row = (candidate.prompt.strip(), *(text.strip() for text in row_texts(candidate).values()))
        is_duplicate = not candidate.rejected_by and row in seen
        kind = "pair" if candidate.worse is not None else "completion"
        checked.append(
            candidate.reject("duplicate", f"an earlier row has the same prompt and {kind}")
            if is_duplicate
            else candidate
        )
        if not candidate.rejected_by:
            seen.add(row)
    return checked


def _filter(candidates: Sequence[Candidate], filters: Sequence[Filter], prompts: Sequence[Prompt]) -> list[Candidate]:
    """Reject candidates that fail one of the filters."""
    rows = [None if candidate.rejected_by else filter_fields(candidate, prompts) for candidate in candidates]
    rejections = {id(each.candidate): each for each in apply_filters(filter(None, rows), filters).rejected}
    found = [rejections.get(id(row)) for row in rows]
    return [
        candidate if rejection is None else candidate.reject(rejection.filter, rejection.reason)
        for candidate, rejection in zip(candidates, found, strict=True)
    ]


def _select(recipe: Recipe, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Let the recipe choose among the candidates that are accepted so far."""
    selected = iter(recipe.select([candidate for candidate in candidates if not candidate.rejected_by]))
    return [candidate if candidate.rejected_by else next(selected) for candidate in candidates]
