"""From prompts to training rows: a recipe's candidates, checked, filtered, and told of."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rayk.config import SynthesisSettings
from rayk.errors import RunFailed
from rayk.serving.event_loop import run_until_complete
from rayk.synthesis.adversarial import Adversarial
from rayk.synthesis.base import Candidate, Recipe, Round
from rayk.synthesis.chain_of_thought import ChainOfThought
from rayk.synthesis.completions import CompletionClient
from rayk.synthesis.judging import Judge, apply_judge, find_judges
from rayk.synthesis.magpie import Magpie
from rayk.synthesis.preferences import Preferences
from rayk.synthesis.prompts import Prompt
from rayk.synthesis.responses import Responses
from rayk.synthesis.self_instruct import SelfInstruct
from rayk.synthesis.store import CompletionStore
from rayk.synthesis.usage import Progress, UsageTracker
from rayk.teachers import Teacher
from rayk.text import Filter, apply_filters

RECIPES: dict[str, type[Recipe]] = {
    "responses": Responses,
    "chain_of_thought": ChainOfThought,
    "self_instruct": SelfInstruct,
    "magpie": Magpie,
    "adversarial": Adversarial,
    "preferences": Preferences,
}

_EXAMPLES = 3


@dataclass(frozen=True)
class RecipeContext:
    """Whom a recipe may ask beside the teacher, and in which round.

    Attributes:
        number, before: as in `Round`.
        student: as it is when the round begins; `student_chats`: it is asked in its tokenizer's chat template.
        referee: where it is not the teacher.
        judges: those that filters `judge` name.
    """

    number: int = 0
    before: Path | None = None
    student: Teacher | None = None
    student_chats: bool = False
    referee: Teacher | None = None
    judges: Mapping[str, Teacher] = field(default_factory=dict)


def synthesize_rows(
    settings: SynthesisSettings, prompts: Sequence[Prompt], teacher: Teacher, store: CompletionStore,
    filters: Sequence[Filter] = (), *, seed: int = 0, progress: Progress = lambda done, total, text: None,
    company: RecipeContext | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Have `teacher` write training rows for `prompts` into `store`, which may hold some of it already.

    Args:
        filters: `settings.filters`, built.
        company: whom else the recipe may ask, and in which round.

    Returns:
        The summary, as `summary.json` holds it.

    Raises:
        InputError: a setting does not fit the teacher.
        RunFailed: the teacher answers nothing, the disk is full, or no row is left.
        TeacherUnavailable: as `Teacher.generate`.
    """
    company = company or RecipeContext()
    scribes = _scribes(settings, teacher, store, seed, progress, company)
    recipe = RECIPES[settings.kind](settings, prompts, scribes["teacher"])
    recipe.round = Round(
        company.number, company.before, scribes.get("student"), scribes.get("referee", scribes["teacher"])
    )
    tally = scribes["teacher"].tally
    rating = _rating(settings, teacher, store, seed, tally, company)
    candidates = run_until_complete(_written(recipe, scribes.values()))
    alone, comparing = ([each for each in filters if each.remembers is which] for which in (False, True))
    candidates = _unlike(_sifted(candidates, alone, prompts))
    for judge, asking in rating:
        rows = [_judged(each, prompts) for each in candidates]
        candidates = run_until_complete(apply_judge(judge, candidates, rows, asking, settings.in_flight))
    candidates = _chosen(recipe, candidates)
    # What remembers others is to remember only what is kept, so it comes after the choice.
    candidates = _sifted(candidates, comparing, prompts)
    kept = [each for each in candidates if not each.rejected_by]
    rejected = [each for each in candidates if each.rejected_by]
    summary = _summary(recipe, candidates, _names(alone, rating, comparing))
    store.keep([_row(each, prompts) for each in kept], [_row(each, prompts) for each in rejected])
    if not kept:
        raise RunFailed(_why_nothing(recipe, rejected))
    store.finish(summary)
    return summary


def _summary(recipe: Recipe, candidates: list[Candidate], filters: Sequence[str]) -> dict[str, Any]:
    """What `summary.json` holds; `filters`: their names, in order."""
    settings, prompts, teacher, tally = recipe.settings, recipe.prompts, recipe.scribe.teacher, recipe.scribe.tally
    kept = [each for each in candidates if not each.rejected_by]
    rejected = [each for each in candidates if each.rejected_by]
    return {
        "kind": settings.kind,
        "about": recipe.summary,
        "paper": recipe.paper,
        "teacher": {"name": teacher.name, "model": teacher.info.model, "engine": teacher.info.engine},
        "prompts": 0 if settings.makes_prompts else len(prompts),
        "candidates": len(candidates),
        "kept": len(kept),
        "rejected": dict.fromkeys(filters, 0) | dict(Counter(each.rejected_by for each in rejected)),
        "unanswered": tally.unanswered,
        "refused": recipe.store.refusals,
        "completions": len(recipe.store),
        "figures": [asdict(figure) for figure in recipe.figures(candidates)],
        "usage": tally.charged,
        "examples": {
            "kept": [_example(each, prompts) for each in _spread(kept)],
            "rejected": [
                _example(each, prompts)
                for by in dict.fromkeys(each.rejected_by for each in rejected)
                for each in _spread([one for one in rejected if one.rejected_by == by])
            ],
        },
    }


def _scribes(
    settings: SynthesisSettings,
    teacher: Teacher,
    store: CompletionStore,
    seed: int,
    progress: Progress,
    company: RecipeContext,
) -> dict[str, CompletionClient]:
    """Who asks whom, by what the asked one is."""
    tally = UsageTracker(store.usage, progress)
    scribes = {"teacher": CompletionClient(teacher, store, settings, seed, tally)}
    if company.student is not None:
        chat = company.student_chats
        scribes["student"] = CompletionClient(company.student, store, settings, seed, tally, role="student", chat=chat)
    if company.referee is not None:
        chat = settings.chat and company.referee.info.engine != "openai"
        scribes["referee"] = CompletionClient(company.referee, store, settings, seed, tally, role="referee", chat=chat)
    return scribes


def _rating(
    settings: SynthesisSettings,
    teacher: Teacher,
    store: CompletionStore,
    seed: int,
    tally: UsageTracker,
    company: RecipeContext,
) -> list[tuple[Judge, CompletionClient]]:
    """The judges among the filters, and who asks each."""
    rating = []
    for judge in find_judges(settings.filters):
        rater = teacher if judge.settings.teacher is None else company.judges[judge.settings.teacher]
        chat = judge.settings.chat and rater.info.engine != "openai"
        rating.append((judge, CompletionClient(rater, store, settings, seed, tally, role="judge", chat=chat)))
    return rating


def _names(
    alone: Iterable[Filter], rating: Iterable[tuple[Judge, CompletionClient]], comparing: Iterable[Filter]
) -> list[str]:
    """What the filters are called, in the order in which they judge."""
    return [*(each.name for each in alone), *(judge.name for judge, _ in rating), *(each.name for each in comparing)]


async def _written(recipe: Recipe, scribes: Iterable[CompletionClient]) -> list[Candidate]:
    async with AsyncExitStack() as stack:
        for scribe in scribes:
            await stack.enter_async_context(scribe)
        async with aclosing(recipe.candidates()) as candidates:
            return [candidate async for candidate in candidates]


def _unlike(candidates: list[Candidate]) -> list[Candidate]:
    """A row that is the same as one before it is rejected."""
    seen: set[tuple[str, ...]] = set()
    checked = []
    for each in candidates:
        row = (each.prompt.strip(), *(text.strip() for text in _answers(each).values()))
        again = not each.rejected_by and row in seen
        same = "pair" if each.worse is not None else "completion"
        checked.append(each.rejected("duplicate", f"the same prompt and {same} came before") if again else each)
        if not each.rejected_by:
            seen.add(row)
    return checked


def _sifted(candidates: list[Candidate], filters: Sequence[Filter], prompts: Sequence[Prompt]) -> list[Candidate]:
    """With what the filters reject rejected."""
    rows = [None if each.rejected_by else _judged(each, prompts) for each in candidates]
    rejections = {id(each.candidate): each for each in apply_filters(filter(None, rows), filters).rejected}
    found = [rejections.get(id(row)) for row in rows]
    return [
        each if rejection is None else each.rejected(rejection.filter, rejection.reason)
        for each, rejection in zip(candidates, found, strict=True)
    ]


def _chosen(recipe: Recipe, candidates: list[Candidate]) -> list[Candidate]:
    """With the recipe's last word on those that are kept so far."""
    chosen = iter(recipe.choose([each for each in candidates if not each.rejected_by]))
    return [each if each.rejected_by else next(chosen) for each in candidates]


def _judged(candidate: Candidate, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What filters look at: of a pair the chosen answer as `completion`, and both by their own names too."""
    return _row(candidate, prompts) | {"completion": candidate.completion}


def _row(candidate: Candidate, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What a row of `rows.parquet` or `rejected.parquet` holds: the source row's fields, and over them what is new."""
    written = candidate.written
    logprobs = [each.mean_logprob for each in written if each.mean_logprob is not None]
    return {
        **({} if candidate.made_up else prompts[candidate.origin].fields),
        "prompt": candidate.prompt,
        **_answers(candidate),
        **candidate.fields,
        "where": prompts[candidate.origin].where,
        "finish_reason": written[0].finish_reason,
        **({} if written[0].tokens is None else {"tokens": written[0].tokens}),
        # Rounded, for a model's last digits depend on which prompts shared a batch.
        "mean_logprob": round(logprobs[0], 4) if logprobs else None,
        "keys": [each.key for each in written],
        **({"rejected_by": candidate.rejected_by, "reason": candidate.reason} if candidate.rejected_by else {}),
    }


def _answers(candidate: Candidate) -> dict[str, str]:
    if candidate.worse is None:
        return {"completion": candidate.completion}
    return {"chosen": candidate.completion, "rejected": candidate.worse}


def _example(candidate: Candidate, prompts: Sequence[Prompt]) -> dict[str, Any]:
    return {
        "where": prompts[candidate.origin].where,
        **{name: getattr(candidate, name) for name in ("prompt", "completion", "worse", "rejected_by", "reason")},
    }


def _spread(candidates: list[Candidate]) -> list[Candidate]:
    """Some of them, from all over."""
    return candidates[:: max(1, len(candidates) // _EXAMPLES)][:_EXAMPLES]


def _why_nothing(recipe: Recipe, rejected: list[Candidate]) -> str:
    """Why no row is left, in sentences."""
    store = recipe.store
    if rejected:
        return (
            f"None of {len(rejected)} completions can be learned from ({_reasons(rejected)}); "
            f"'{store.folder / 'rejected.parquet'}' holds them with the reasons."
        )
    return (
        f"Nothing in the {len(store):,} completions is what synthesis '{recipe.settings.kind}' asked for; look into "
        f"'{store.folder / 'completions'}'. Is synthesis.chat (of an endpoint: engine.chat) as the teacher is, a chat "
        "model or a base model?"
    )


def _reasons(rejected: list[Candidate]) -> str:
    first: Mapping[str, str] = {each.rejected_by: each.reason for each in reversed(rejected)}
    counts = Counter(each.rejected_by for each in rejected)
    return "; ".join(f"{count} {by}, the first: {first[by]}" for by, count in counts.most_common())
