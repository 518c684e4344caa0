"""Interface of recipes, which turn prompts into candidates for training rows, in an order that does not depend on the
order in which responses arrive."""

from abc import ABC
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Generic, TypeVar

from rayk.config import SamplingConfig, SynthesisSettings, TeacherConfig
from rayk.engines.base import SamplingParameters
from rayk.synthesis.completions import CompletionClient
from rayk.synthesis.concurrency import run_in_order
from rayk.synthesis.prompts import Prompt
from rayk.synthesis.store import CompletionStore, StoredCompletion

S = TypeVar("S", bound=SynthesisSettings)


@dataclass(frozen=True)
class Candidate:
    """A possible training row.

    Attributes:
        prompt, completion: text that the student would be trained on.
        prompt_index: index of the prompt in `Recipe.prompts` that the row belongs to.
        responses: model responses that the row was made from; the first contains the completion.
        fields: additional fields of the row.
        new_prompt: whether the prompt was generated, so that the source row's other fields do not apply to it.
        rejected_by: name of the check that rejected the candidate, with the `reason`; empty while it is accepted.
        worse: for preference pairs, the worse completion of the same prompt.
        messages: the conversation that the student reads as the prompt; empty: that of the source row if `prompt` is
            its text, else one user's message. Only used if the source's rows are messages.
    """

    prompt: str
    completion: str
    prompt_index: int
    responses: tuple[StoredCompletion, ...]
    fields: dict[str, Any] = field(default_factory=dict)
    new_prompt: bool = False
    rejected_by: str = ""
    reason: str = ""
    worse: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()

    def reject(self, by: str, reason: str) -> "Candidate":
        """Return the candidate as rejected."""
        return replace(self, rejected_by=by, reason=reason)


@dataclass(frozen=True)
class Round:
    """The round that a recipe generates rows for, with clients of the other models.

    Attributes:
        number: from 0; a run without `rounds` is its own first round.
        before: synthesis folder of the previous round; None in the first.
        student: client of the student as it is when the round begins; None if the settings do not need it.
        referee: client of `settings.referee`; the teacher's client if that is the same model.
    """

    number: int
    before: Path | None
    student: CompletionClient | None
    referee: CompletionClient


@dataclass(frozen=True)
class Statistic:
    """A number for the report: a share from 0 to 1, a count (an int) or a mean."""

    name: str
    value: float
    share: bool = True


class Recipe(ABC, Generic[S]):
    """Implementation of a synthesis. Each built-in recipe has its own file and is listed in `rayk.synthesis.RECIPES`.

    A recipe overrides `generate` if the candidates of one prompt do not depend on other prompts, else `candidates`.

    Attributes:
        summary: what the recipe does, in one line for the report.
        paper: its source; empty if there is none.
        example_fields: fields that the recipe adds to rows, with example values for `rayk doctor`.
        round: set before `candidates` is called.
    """

    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    example_fields: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    def __init__(self, settings: S, prompts: Sequence[Prompt], client: CompletionClient):
        self.settings, self.prompts, self.client = settings, prompts, client
        self.round = Round(0, None, None, client)

    @property
    def store(self) -> CompletionStore:
        """Store of the completions; a recipe may write additional tables to it."""
        return self.client.store

    @classmethod
    def check(cls, settings: S, teacher: TeacherConfig) -> None:
        """Check the settings before the teacher is started.

        Raises:
            InputError: they cannot work.
        """

    @classmethod
    def check_prompts(cls, prompts: Sequence[Prompt]) -> None:
        """Check the prompts before the teacher is started.

        Raises:
            InputError: the recipe cannot use one of them.
        """

    @property
    def max_requests(self) -> int:
        """Largest number of completions that the recipe requests, for the progress; by default one per prompt."""
        return len(self.prompts)

    async def generate(self, index: int, prompt: Prompt) -> list[Candidate]:
        """Return the candidates of `prompts[index]`; those that cannot be used are rejected with a reason."""
        raise NotImplementedError(f"{type(self).__name__} overrides neither 'generate' nor 'candidates'")

    async def candidates(self) -> AsyncGenerator[Candidate, None]:
        """Yield the candidates of all prompts in order; those that cannot be used are rejected with a reason."""
        self.client.total = self.max_requests
        work = (self.generate(index, prompt) for index, prompt in enumerate(self.prompts))
        async with aclosing(run_in_order(work, self.settings.in_flight)) as results:
            async for candidates in results:
                for candidate in candidates:
                    yield candidate

    def select(self, accepted: list[Candidate]) -> list[Candidate]:
        """Choose among the candidates of all prompts that passed the filters: return them in order, some rejected."""
        return accepted

    def statistics(self, candidates: Sequence[Candidate]) -> list[Statistic]:
        """Compute the recipe's numbers for the report from all candidates."""
        return []


class PromptGeneratingRecipe(Recipe[S]):
    """A recipe whose teacher generates the prompts too (`settings.makes_prompts`)."""

    @classmethod
    def seed_prompts(cls, settings: S) -> list[Prompt]:
        """Return the prompts that generation starts from; by default one empty prompt.

        Raises:
            InputError: they cannot be read.
        """
        return [Prompt("", "synthesis", {})]


def sampling_parameters(sampling: SamplingConfig) -> SamplingParameters:
    """Convert sampling settings to the parameters of a request."""
    return SamplingParameters(
        sampling.max_new_tokens, sampling.temperature, sampling.top_p, stop=tuple(sampling.stop)
    )  # fmt: skip


def completion_text(response: StoredCompletion, stop: Sequence[str] = ()) -> str:
    """Return the text before the first stop text, which some engines return too, without trailing white space."""
    text = response.text
    for stop_text in stop:
        text = text.split(stop_text, 1)[0]
    return text.rstrip()


MISSING_RESPONSE = ("unanswered", "refused")
"""Checks that fail if there is no response: the request failed this time, or was refused for good."""


def missing_response(response: StoredCompletion) -> tuple[str, str] | None:
    """Return the check that fails if a response has no answer, and the reason; None if it has one: one of
    `MISSING_RESPONSE`, or 'truncated' if it ends inside the model's thought."""
    if response.is_cut_in_thought:
        return "truncated", (
            "ends inside the model's thought; allow more tokens, or switch thinking off (often with "
            "teachers.chat_template_kwargs: {enable_thinking: false})"
        )
    if response.finish_reason != "error":
        return None
    return MISSING_RESPONSE[response.refused], response.reason


def completion_problem(response: StoredCompletion, text: str, model: str = "teacher") -> tuple[str, str] | None:
    """Return the check that a completion fails in any recipe, and the reason; None if the completion can be used."""
    if missing := missing_response(response):
        return missing
    if not text.strip():
        return "empty", f"the {model} generated no text"
    return None
