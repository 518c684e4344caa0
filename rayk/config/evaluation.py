"""Measurements on held-out rows."""

from typing import Annotated

from pydantic import Field, model_validator

from rayk.config.base import FUNCTION_PATTERN, AnswerPattern, Positive, Settings
from rayk.config.support import TopK

Metric = Annotated[str, Field(pattern=rf"^(rouge_l|{FUNCTION_PATTERN[1:-1]})$")]


class GenerationConfig(Settings):
    """Generation of the student's answers to the evaluation prompts."""

    max_new_tokens: Positive = 128
    """Longest answer in tokens; longer ones are cut."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Sampling temperature; 0 is greedy decoding."""
    rows: Positive | None = None
    """Number of evaluation rows to answer, from the beginning; `null`: all."""


class EvaluationConfig(Settings):
    """Measurements on held-out rows: the loss, the divergence from the teacher, and the quality of answers."""

    every_steps: Positive | None = None
    """Number of steps between two measurements of loss and divergences; `null`: only at the end."""
    before_training: bool = True
    """Also measure the student before its first update."""
    support: TopK = TopK()
    """The part of the teacher's distribution that the divergences are computed on."""
    generation: GenerationConfig | None = None
    """Generate answers to the evaluation prompts and score them; `null`: only losses and divergences are measured."""
    answer_field: str | None = None
    """The row's field with the right answer; `null`: the completion."""
    answer_pattern: AnswerPattern | None = None
    """A regular expression with one group that finds the answer, such as '#### (.+)', in the row's text and in the
    student's; the last match counts. `null`: the whole texts are compared, after normalizing white space."""
    metrics: list[Metric] = Field(default_factory=list)
    """More metrics of the generated answers; needs `generation`. `rouge_l`: ROUGE-L F between the generated and the
    right answer. Or your own function 'module:name', called as
    `metric(completion: str, row: Mapping[str, Any]) -> float` with the answer's text and the row's fields. The mean
    over the answered rows is reported under the function's name."""
    samples: Annotated[int, Field(ge=0)] = 8
    """Number of answers shown in the report."""
    demonstration_draws: Positive = 1
    """With method `in_context`: number of times that each row is answered, each time with another random draw of
    demonstrations; the most frequent answer counts."""

    @model_validator(mode="after")
    def _check_metrics(self) -> "EvaluationConfig":
        if self.metrics and self.generation is None:
            raise ValueError("'metrics' are computed on generated answers; set 'generation' too, or leave them out")
        return self
