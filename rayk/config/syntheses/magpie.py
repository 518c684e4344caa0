"""Settings of `magpie`."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from rayk.config.base import InputPath, Positive, Selection
from rayk.config.filters import (
    EndingFilterConfig,
    FilterSettings,
    LengthFilterConfig,
    NearDuplicatesFilterConfig,
    TextFilterConfig,
)
from rayk.config.sampling import SamplingConfig
from rayk.config.sections import SynthesisSettings
from rayk.config.teachers import TeacherConfig


class InstructionSamplingConfig(SamplingConfig):
    """Sampling of instructions: from the model's own distribution, without truncation."""

    max_new_tokens: Positive = 2048
    """Longest instruction in tokens."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Sampling temperature; 0 is greedy decoding."""


class ResponseSamplingConfig(SamplingConfig):
    """Sampling of answers to instructions."""

    max_new_tokens: Positive = 4096
    """Longest answer in tokens."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Sampling temperature; 0 is greedy decoding."""


def _default_instruction_filters() -> list[TextFilterConfig]:
    return [
        LengthFilterConfig(minimum=3),
        EndingFilterConfig(),
        NearDuplicatesFilterConfig(fields=("prompt",)),
    ]


class MagpieConfig(SynthesisSettings):
    """Instructions that a chat model generates after the beginning of a user's turn, and its answers to them
    (Magpie)."""

    kind: Literal["magpie"] = "magpie"
    """The synthesis' kind."""
    instructions: Annotated[Positive, Selection()] = 1000
    """Number of instructions to sample; those that pass `instruction_filters` are answered."""
    system: Annotated[str, Field(min_length=1)] | None = None
    """A system prompt for sampling instructions, which may name a subject; answers are generated without it. `null`:
    none."""
    tokenizer: InputPath | None = None
    """The tokenizer whose chat template is used: a local folder or hub id; `null`: the teacher's own. An endpoint
    (engine kind `openai`) needs it, and `engine.chat: false`, because only plain completions can continue a turn."""
    sampling: InstructionSamplingConfig = Field(default_factory=InstructionSamplingConfig)
    """Sampling of instructions."""
    responses: ResponseSamplingConfig = Field(default_factory=ResponseSamplingConfig)
    """Sampling of answers."""
    role_words: tuple[Annotated[str, Field(min_length=1)], ...] = ("assistant",)
    """Words that also end an instruction, because a model may generate the next role's name without ending the turn. An
    instruction in which such a word occurs within a line is rejected. []: none."""
    stop_at_newline: bool = False
    """End each instruction after its first line."""
    instruction_filters: Annotated[list[TextFilterConfig], Selection()] = Field(
        default_factory=_default_instruction_filters
    )
    """Filters of the instructions before they are answered; the filters' `field` is ignored."""
    keep_longest: Annotated[Positive | None, Selection()] = None
    """Number of rows to keep: those with the longest answers, in characters, among the rows that pass `filters`;
    `null`: all."""

    @property
    def makes_prompts(self) -> bool:
        return True

    @property
    def all_filters(self) -> Sequence[FilterSettings]:
        return [*self.filters, *self.instruction_filters]

    @model_validator(mode="after")
    def _check_chat(self) -> "MagpieConfig":
        if self.chat:
            raise ValueError("synthesis.chat: 'magpie' always uses the teacher's chat template; leave it out")
        return self

    def check_teacher(self, teacher: TeacherConfig) -> None:
        super().check_teacher(teacher)
        own_template = teacher.engine.applies_chat_template
        if own_template and (not teacher.engine.continues_prompts or self.tokenizer is None):
            raise ValueError(
                "synthesis 'magpie' sends the beginning of a user's turn, which chat completions do not accept: "
                f"teacher '{teacher.name}' needs engine.chat: false (an endpoint that has plain completions), and "
                "synthesis.tokenizer with its chat template"
            )
