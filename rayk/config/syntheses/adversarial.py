"""Settings of `adversarial`."""

from typing import Annotated, Literal

from pydantic import Field

from rayk.config.base import Positive, Selection
from rayk.config.sampling import SamplingConfig
from rayk.config.syntheses.checks import template_with
from rayk.config.syntheses.student import StudentSynthesisConfig


class AnswerSamplingConfig(SamplingConfig):
    """Sampling of answers to instructions."""

    max_new_tokens: Positive = 1024
    """Longest answer in tokens."""


class RefereeSamplingConfig(SamplingConfig):
    """Sampling of comparisons of answers."""

    max_new_tokens: Positive = 512
    """Longest comparison in tokens."""
    temperature: Annotated[float, Field(ge=0)] = 0.2
    """Sampling temperature; 0 is greedy decoding."""


class AdversarialConfig(StudentSynthesisConfig):
    """In each of several `rounds`, new instructions similar to those where the student is behind the teacher (Lion)."""

    kind: Literal["adversarial"] = "adversarial"
    """The synthesis' kind."""
    referee: str | None = None
    """Which of `teachers` compares answers; `null`: the teacher that generates the rows."""
    sampling: AnswerSamplingConfig = Field(default_factory=AnswerSamplingConfig)
    """Sampling of the answers of teacher and student."""
    referee_sampling: Annotated[RefereeSamplingConfig, Selection()] = Field(default_factory=RefereeSamplingConfig)
    """Sampling of comparisons."""
    threshold: Annotated[float, Selection()] = 1.0
    """An instruction is hard if the teacher's answer scores at least this many points (of 10) above the student's, else
    easy."""
    instructions: Annotated[Positive, Selection()] = 3000
    """Number of new instructions per round that are generated from hard ones; fewer if the teacher only repeats itself,
    and none if there are no hard ones."""
    easy_instructions: Annotated[int, Field(ge=0)] | None = None
    """Number of new instructions per round that are generated from easy ones; `null`: the value of `instructions`."""
    batch: Positive = 64
    """Largest number of new instructions from hard ones, and from easy ones, that are requested at once."""
    instruction_temperature: Annotated[float, Field(ge=0)] = 1.0
    """Sampling temperature of new instructions."""
    instruction_tokens_per_word: Positive = 4
    """Longest new instruction, in tokens per word of the instruction that it is generated from; at least 32 tokens."""
    blacklist: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Selection()] = (
        "instruction", "instructions", "given prompt", "new prompt",
    )  # fmt: skip
    """Words that reject a new instruction, because it talks about the request itself. []: none."""
    hard_template: Annotated[str, template_with("instruction"), Selection()] | None = None
    """Prompt for a new instruction of the same domain and type as a hard one; `null`: rayk's own, with examples for
    base models and without for chat models."""
    easy_template: Annotated[str, template_with("instruction"), Selection()] | None = None
    """Prompt for a rarer instruction of the same domain as an easy one; `null`: rayk's own."""
    referee_template: Annotated[str, template_with("instruction", "first", "second"), Selection()] | None = None
    """Prompt for the scores of two answers, 'A' and 'B', from 1 to 10; `null`: rayk's own. Scores are read from lines
    such as 'Score of A: 8' (the last of each), else from the last line that has two numbers and nothing else."""

    @property
    def referee_name(self) -> str | None:
        return self.referee

    @property
    def instructions_of(self) -> dict[str, int]:
        """Number of new instructions per round, by the kind of instruction that they are generated from."""
        easy = self.instructions if self.easy_instructions is None else self.easy_instructions
        return {"hard": self.instructions, "easy": easy}

    def queries_student(self, round_number: int) -> bool:
        return round_number > 0
