"""What is measured on held-out rows."""

from typing import Annotated

from pydantic import Field

from rayk.config.base import AnswerPattern, FunctionPath, Positive, Settings
from rayk.config.support import TopK


class GenerationConfig(Settings):
    """How the student answers evaluation prompts."""

    max_new_tokens: Positive = 128
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0: greedy."""
    rows: Positive | None = None
    """Only the first so many evaluation rows."""


class EvaluationConfig(Settings):
    """Measuring on held-out rows: loss, distance to the teacher, and the task itself."""

    every_steps: Positive | None = None
    """Loss and divergences this often; always at the end."""
    support: TopK = TopK()
    """What the teacher is asked for the divergences."""
    generation: GenerationConfig | None = None
    """Also answer the prompts and score the answers; `null` measures only losses."""
    answer_field: str | None = None
    """The row's field with the truth; by default the completion."""
    answer_pattern: AnswerPattern | None = None
    """A regular expression with one group that finds the answer in both texts (the last match counts), such as
    '#### (.+)'; by default the whole text, white space folded."""
    metrics: list[FunctionPath] = Field(default_factory=list)
    """Metrics of your own beside the built-in ones, each a function 'module:name' called with (completion, row) for
    each evaluated row, where `row` is a mapping of the row's fields. It returns a number; the mean is reported under
    the function's name. Needs `generation`."""
    before_training: bool = True
    """Also measure the student before its first update."""
    samples: Annotated[int, Field(ge=0)] = 8
    """Completions kept for the report."""
    demonstration_draws: Positive = 1
    """With method `in_context`: how many random draws of demonstrations answer a row; the majority decides."""
