"""What a recipe is: prompts in, candidates for training rows out, in an order that depends on nothing but them."""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from rayk.config import SamplingConfig, SynthesisSettings, TeacherConfig
from rayk.engines.base import SamplingParameters
from rayk.synthesis.completions import CompletionClient, run_in_order
from rayk.synthesis.prompts import Prompt
from rayk.synthesis.store import CompletionStore, StoredCompletion

S = TypeVar("S", bound=SynthesisSettings)


@dataclass(frozen=True)
class Candidate:
    """A training row that may be.

    Attributes:
        prompt, completion: what the student would learn.
        worse: beside the completion, a worse answer to the same prompt, where rows are pairs of such.
        origin: which prompt it is for, by place.
        written: what the teacher wrote for it, call by call.
        fields: what else is kept with it.
        made_up: the teacher made up the prompt, so that the other fields of the row it is for say nothing about it.
        rejected_by: the check that it did not pass, with the `reason` in words; empty while it is kept.
    """

    prompt: str
    completion: str
    origin: int
    written: tuple[StoredCompletion, ...]
    fields: dict[str, Any] = field(default_factory=dict)
    made_up: bool = False
    rejected_by: str = ""
    reason: str = ""
    worse: str | None = None

    def rejected(self, by: str, reason: str) -> "Candidate":
        return replace(self, rejected_by=by, reason=reason)


@dataclass(frozen=True)
class Round:
    """Which round a recipe writes for, and whom it may ask beside the teacher.

    Attributes:
        number: from 0; a run without `rounds` is its own first one.
        before: the folder of what was synthesised in the round before; None in the first.
        student: asks the student as it is when the round begins; None where `settings.asks_student` does not want it.
        referee: asks `settings.referee`; the teacher's own scribe where that is the same.
    """

    number: int
    before: Path | None
    student: CompletionClient | None
    referee: CompletionClient


@dataclass(frozen=True)
class Statistic:
    """A number of the report: a share from 0 to 1, a count (an int) or a mean."""

    name: str
    value: float
    share: bool = True


class Recipe(ABC, Generic[S]):
    """A way of making data. One file an implementation; `rayk.synthesis.RECIPES` lists them. One that writes for each
    prompt alone is a `PerPromptRecipe`, one that makes up its prompts an `PromptGeneratingRecipe`.

    Attributes:
        round: set by whoever has it write, before it does.
    """

    summary: ClassVar[str]
    paper: ClassVar[str]

    def __init__(self, settings: S, prompts: Sequence[Prompt], scribe: CompletionClient):
        self.settings, self.prompts, self.scribe = settings, prompts, scribe
        self.round = Round(0, None, None, scribe)

    @property
    def store(self) -> CompletionStore:
        """What was written, and where a recipe may keep more."""
        return self.scribe.store

    @classmethod
    def check(cls, settings: S, writer: TeacherConfig) -> None:
        """Refuse settings that cannot work, before the teacher that is to write is brought up.

        Raises:
            InputError: they cannot.
        """

    @property
    @abstractmethod
    def requests(self) -> int:
        """The completions it asks for, at the most."""

    @abstractmethod
    def candidates(self) -> AsyncGenerator[Candidate, None]:
        """All candidates, those that cannot be used rejected with the reason."""

    def choose(self, kept: list[Candidate]) -> list[Candidate]:
        """Look once more at what has passed the filters, all prompts together: the same candidates in order, some of
        them rejected now."""
        return kept

    def figures(self, candidates: Sequence[Candidate]) -> list[Statistic]:
        """What the recipe reports of all its candidates."""
        return []


class PerPromptRecipe(Recipe[S]):
    """A recipe whose candidates for one prompt depend on no other prompt."""

    @abstractmethod
    async def generate_for_prompt(self, place: int, prompt: Prompt) -> list[Candidate]:
        """The candidates of one prompt."""

    async def candidates(self) -> AsyncGenerator[Candidate, None]:
        """Prompt by prompt."""
        self.scribe.total = self.requests
        work = (self.generate_for_prompt(place, prompt) for place, prompt in enumerate(self.prompts))
        async with aclosing(run_in_order(work, self.settings.in_flight)) as written:
            async for candidates in written:
                for candidate in candidates:
                    yield candidate


class PromptGeneratingRecipe(Recipe[S]):
    """A recipe whose teacher makes up the prompts too (`settings.makes_prompts`)."""

    @classmethod
    @abstractmethod
    def seed_prompts(cls, settings: S) -> list[Prompt]:
        """What it starts from instead.

        Raises:
            InputError: it cannot be read.
        """


def sampling_parameters(sampling: SamplingConfig) -> SamplingParameters:
    """How the teacher is asked to write."""
    return SamplingParameters(
        sampling.max_new_tokens, sampling.temperature, sampling.top_p, stop=tuple(sampling.stop)
    )  # fmt: skip


def completion_text(written: StoredCompletion, stop: Sequence[str] = ()) -> str:
    """What was written up to the text that ended it (engines differ in whether they keep that), without the white space
    behind."""
    text = written.text
    for each in stop:
        text = text.split(each, 1)[0]
    return text.rstrip()


MISSING_RESPONSE = ("unanswered", "refused")
"""By what is rejected that was not written: it may be another time, or will not be."""


def missing_response(written: StoredCompletion) -> tuple[str, str] | None:
    """Which of `MISSING_RESPONSE` this is, and why; None where it is an answer."""
    if written.finish_reason != "error":
        return None
    return MISSING_RESPONSE[written.refused], written.reason


def completion_problem(written: StoredCompletion, text: str, by: str = "teacher") -> tuple[str, str] | None:
    """The check that a completion does not pass by itself, and why; None where it is one."""
    if lack := missing_response(written):
        return lack
    if not text.strip():
        return "empty", f"the {by} wrote nothing"
    return None
