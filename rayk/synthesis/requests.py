"""A request for one completion."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rayk.engines.base import SamplingParameters


@dataclass(frozen=True)
class CompletionRequest:
    """Request for one completion.

    Attributes:
        prompt: text that the model is asked to complete or answer.
        messages: the conversation that the model is asked to continue, if it is more than `prompt` as a user's message;
            it needs a chat template. See `rayk.synthesis.Prompt.request`.
        tools: schemas of the tools that the conversation's assistant may call.
        raw_prompt: exact text that the model reads, if the recipe has formatted the prompt itself: neither the chat
            template nor the tokenizer's prefix is added. The store still finds the request by `prompt`, because a
            template may insert the current date.
    """

    prompt: str
    seed: int
    parameters: SamplingParameters
    raw_prompt: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: list[dict[str, Any]] | None = None

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling parameters by name; the ends are left out, because they follow from the model."""
        return {name: value for name, value in asdict(self.parameters).items() if name != "end_token_ids"}
