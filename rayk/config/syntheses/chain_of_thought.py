"""Settings of `chain_of_thought`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rayk.config.base import Positive, Selection
from rayk.config.sampling import SamplingConfig
from rayk.config.sections import SynthesisSettings
from rayk.config.syntheses.answer import AnswerConfig
from rayk.config.syntheses.checks import refuse_thoughts, template_with


class RationaleSamplingConfig(SamplingConfig):
    """Sampling of rationales."""

    max_new_tokens: Positive = 128
    """Longest rationale in tokens."""


class ChainOfThoughtConfig(SynthesisSettings):
    """The teacher's step-by-step rationales that end in the right answer (Fine-tune-CoT)."""

    kind: Literal["chain_of_thought"] = "chain_of_thought"
    """The synthesis' kind."""
    sampling: RationaleSamplingConfig = Field(default_factory=RationaleSamplingConfig)
    """Sampling of rationales."""
    rationales: Positive = 1
    """Number of rationales per question (D in the paper)."""
    answer: Annotated[AnswerConfig, Selection()] = Field(default_factory=AnswerConfig)
    """The form of answers."""
    keep: Annotated[Literal["correct", "answered"], Selection()] = "correct"
    """`correct`: keep the rationales with the right answer. `answered`: keep all rationales with an answer, for rows
    without a right answer."""
    rationale_template: Annotated[str, template_with("question")] = "Q: {question}\nA: Let's think step by step."
    """Prompt of the first request."""
    answer_template: Annotated[str, template_with("asked", "rationale")] = (
        "{asked} {rationale}\nTherefore, the answer is"
    )
    """Prompt of the second request; {asked} is the prompt of the first request."""
    answer_tokens: Positive = 32
    """Longest answer to the second request in tokens; it is decoded greedily."""
    student_format: Annotated[Literal["delimiters", "plain"], Selection()] = "delimiters"
    """The form of the student's rows. `delimiters`: prompt `<question> ###`, completion `<rationale> --> <answer>`.
    `plain`: prompt `<question>`, completion `<rationale>\\nTherefore, the answer is <answer>.`; for
    `data.chat_template: true`."""

    @property
    def reads_truth(self) -> bool:
        return self.keep == "correct"

    @model_validator(mode="after")
    def _check_thoughts(self) -> "ChainOfThoughtConfig":
        refuse_thoughts(self)
        return self
