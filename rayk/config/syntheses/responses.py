"""Settings of `responses`."""

from typing import Annotated, Literal

from pydantic import Field

from rayk.config.base import Positive, Selection
from rayk.config.sections import SynthesisSettings
from rayk.config.syntheses.answer import AnswerConfig, Scorer


class ResponsesConfig(SynthesisSettings):
    """The teacher's answers to the rows' prompts (sequence-level KD)."""

    kind: Literal["responses"] = "responses"
    """The synthesis' kind."""
    samples: Positive = 1
    """Number of completions per prompt."""
    keep: Annotated[Literal["all", "best"], Selection()] = "all"
    """Keep all samples of a prompt, or the one with the highest score (the first, if several have it)."""
    scorer: Annotated[Scorer, Selection()] = "mean_logprob"
    """The score for `keep: best`. `mean_logprob`: the mean log-prob under the teacher; `answer`: 1 for a right answer,
    and no sample is kept if none is right; or your function 'module:name', called as
    `function(prompt, completion, row)`, which returns a number (higher is better)."""
    answer: Annotated[AnswerConfig, Selection()] = Field(default_factory=AnswerConfig)
    """The form of answers, for scorer `answer`."""

    @property
    def reads_truth(self) -> bool:
        return self.keep == "best" and self.scorer == "answer"

    @property
    def needs_logprobs(self) -> bool:
        return self.keep == "best" and self.scorer == "mean_logprob"
