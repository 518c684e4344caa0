"""The `Engine` protocol: a model that scores token sequences and generates completions, without Ray.

An engine of your own is a class with these methods; `engine: {kind: custom, path: my_file:MyEngine}` names it. It is
called as `MyEngine(model, settings, trust_remote_code=…)`, where `settings` is the `engine` section.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rayk.config.support import Support
from rayk.engines.speculative import Draft, Verdict
from rayk.errors import InputError
from rayk.models import Head
from rayk.signals.batch import SignalBatch
from rayk.signals.sequence import TokenSequence

Prompt = str | np.ndarray | list[dict[str, Any]]
"""Text, or token ids; for an endpoint with a chat template also messages ({role, content})."""


@dataclass(frozen=True)
class EngineInfo:
    """Properties of the model and its engine that clients need before they send requests."""

    model: str
    """The model's name in messages."""
    vocab_size: int
    """Number of leading token ids that signals are over: real tokens, without the padding of the embedding, and without
    tokens that the student lacks (`teachers.vocab_size`)."""
    max_tokens: int
    """Longest sequence that the model accepts, in tokens."""
    tokenizer_fingerprint: str
    """Result of `rayk.models.tokenizer_fingerprint`: equal for tokenizers with the same ids for all tokens."""
    dtype: str
    device: str
    supports: tuple[str, ...]
    """Kinds of support that `score` returns."""
    hidden_size: int = 0
    """Width of the final hidden states; 0 if the engine does not return them."""
    attention_widths: tuple[int, int, int] = (0, 0, 0)
    """Sizes of a layer's queries, keys and values in support `layers` with part `attention`; 0 without it."""
    engine: str = "transformers"
    """The engine's kind; different engines compute slightly different numbers from the same weights."""
    weights_fingerprint: str = ""
    """Changes with the weights (`rayk.models.weights_fingerprint`); empty if unknown, as for an endpoint."""
    can_verify: bool = False
    """Whether the engine is a `VerifyingEngine`."""
    applies_chat_template: bool = False
    """Whether the engine puts each prompt into a chat template as a user's message; an endpoint may do so."""


@dataclass(frozen=True)
class SamplingParameters:
    """Parameters of a completion. `temperature` 0 is greedy. The same seed gives the same tokens in any batch."""

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    """Strings that end a completion; the completion includes the string that ended it."""
    end_token_ids: tuple[int, ...] = ()
    """Ids of the tokens that end a completion; empty: the model's own."""

    def __post_init__(self) -> None:
        numbers_fit = self.max_new_tokens >= 1 and self.temperature >= 0 and 0 < self.top_p <= 1 and self.top_k >= 0
        if not numbers_fit or "" in self.stop:
            raise InputError(
                "Sampling needs max_new_tokens >= 1, temperature >= 0, 0 < top_p <= 1, top_k >= 0 (0: all tokens) and "
                f"no empty stop, not {self}."
            )


@dataclass(frozen=True)
class GeneratedSequence:
    """The completion of one prompt.

    Attributes:
        token_ids: int32 [tokens], EOS included if it ended the completion; empty for an endpoint.
        logprobs: float32 [tokens], log-probs of the tokens under the model at temperature 1 without truncation, in
            nats; for an endpoint as the endpoint computes them, and only if requested.
        finish_reason: 'stop' or 'length'; 'error' if an endpoint returned no completion.
        text: the completion without special tokens.
        reason: why an endpoint returned no completion.
        refused: whether the endpoint refused this prompt, so that a retry would not help.
        thought: the thought of a reasoning model that an endpoint returned apart from the text.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: str
    text: str
    reason: str = ""
    refused: bool = False
    thought: str = ""


@dataclass
class Usage:
    """Requests to a paid endpoint and their cost."""

    requests: int = 0
    """Retries included."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None
    """In the currency of the prices; None without prices. Computed from the token counts in the responses, so requests
    whose response was lost are not included."""
    given_up: int = 0
    """Number of prompts without a completion."""


class Engine(Protocol):
    """A model in this process. Calls may be concurrent; the engine merges them into batches."""

    info: EngineInfo

    async def score(self, sequences: Sequence[TokenSequence], support: Support) -> SignalBatch:
        """Return the model's signals at the counted tokens, one row per sequence, in order."""
        ...

    def head(self) -> Head:
        """Return the head that maps the hidden states of support `hidden` to logits."""
        ...

    async def generate(
        self, prompts: Sequence[Prompt], parameters: SamplingParameters, seeds: Sequence[int]
    ) -> list[GeneratedSequence]:
        """Return one completion per prompt, in order."""
        ...

    async def warm_up(self) -> None:
        """Compute a small request, so that the first real one does not wait for compilation and memory allocation."""
        ...

    async def check_health(self) -> None:
        """Raise an exception if the engine can no longer answer requests."""
        ...


class VerifyingEngine(Engine, Protocol):
    """An engine that can also verify drafts, for teacher-mixed sampling; its `info.can_verify` is true."""

    async def verify(self, drafts: Sequence[Draft]) -> list[Verdict]:
        """Return one verdict per draft, in order: the number of accepted tokens, and candidates for the first rejected
        one."""
        ...
