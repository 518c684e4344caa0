"""What every engine offers: a model that scores token sequences and generates completions, without Ray."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rayk.config.support import Support
from rayk.engines.speculative import Draft, Verdict
from rayk.errors import InputError
from rayk.models import Head
from rayk.signals.batch import SignalBatch
from rayk.signals.sequence import TokenSequence

Prompt = str | np.ndarray
"""Text, or token ids."""


@dataclass(frozen=True)
class EngineInfo:
    """What a client must know of a model before it asks."""

    model: str
    vocab_size: int
    """Real tokens, without the padding of the embedding."""
    max_tokens: int
    """Longest sequence the model takes."""
    tokenizer_fingerprint: str
    dtype: str
    device: str
    supports: tuple[str, ...]
    hidden_size: int = 0
    """Width of the final hidden states; 0 where the engine does not give them."""
    engine: str = "transformers"
    """The engine's kind: another one computes slightly other numbers from the same weights."""
    weights_fingerprint: str = ""
    """Changes with the weights (`rayk.models.weights_fingerprint`); empty where they are not known, as behind an
    endpoint."""
    can_verify: bool = False
    """Whether it is a `VerifyingEngine`."""
    applies_chat_template: bool = False
    """Whether it puts every prompt into a chat template itself, as a user's message; an endpoint may."""


@dataclass(frozen=True)
class SamplingParameters:
    """How to continue a prompt. `temperature` 0 is greedy; the same seed gives the same text whatever else is asked."""

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    """Texts that end a continuation; it keeps the one it ended with."""

    def __post_init__(self) -> None:
        numbers_fit = self.max_new_tokens >= 1 and self.temperature >= 0 and 0 < self.top_p <= 1 and self.top_k >= 0
        if not numbers_fit or "" in self.stop:
            raise InputError(
                "Sampling needs max_new_tokens >= 1, temperature >= 0, 0 < top_p <= 1, top_k >= 0 (0: all tokens) and "
                f"no empty stop, not {self}."
            )


@dataclass(frozen=True)
class GeneratedSequence:
    """One continuation: its token ids (EOS included where it ended so), their log-probs under the model at temperature
    1 without truncation (nats), `finish_reason` 'stop' or 'length', and its text without special tokens.

    An endpoint tells no token ids, and log-probs only where asked to, in its own way. A continuation that could not be
    had from it has `finish_reason` 'error' and a `reason`; `refused` where that lies in the prompt and not in the
    endpoint, so that asking again would not help.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: str
    text: str
    reason: str = ""
    refused: bool = False


@dataclass
class Usage:
    """What has been asked of a paid endpoint."""

    requests: int = 0
    """Retries included."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None
    """In the currency of the prices, as the endpoint counted, so without answers that got lost; None without prices."""
    given_up: int = 0
    """Prompts without a continuation."""


class Engine(Protocol):
    """A model in this process. Calls may come concurrently; the engine merges them into batches that suit it."""

    info: EngineInfo

    async def score(self, sequences: Sequence[TokenSequence], support: Support) -> SignalBatch:
        """The teacher's signals at the counted positions, a row a sequence, in order."""
        ...

    def head(self) -> Head:
        """What makes logits of the hidden states that support `hidden` sends."""
        ...

    async def generate(
        self, prompts: Sequence[Prompt], parameters: SamplingParameters, seeds: Sequence[int]
    ) -> list[GeneratedSequence]:
        """One continuation a prompt, in order."""
        ...

    async def warm_up(self) -> None:
        """Answer something small, so that the first real request does not pay for compilation and allocation."""
        ...

    async def check_health(self) -> None:
        """Raise if the engine can no longer answer."""
        ...


class VerifyingEngine(Engine, Protocol):
    """An engine that also takes part in teacher-mixed sampling; its `info.can_verify` says so."""

    async def verify(self, drafts: Sequence[Draft]) -> list[Verdict]:
        """Which drafted tokens are kept, and what may replace the first that is not; a verdict each, in order."""
        ...
