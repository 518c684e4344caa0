"""Settings of answers: their form, and scores of completions."""

from typing import Annotated

from pydantic import Field

from rayk.config.base import FUNCTION_PATTERN, AnswerChoices, AnswerPattern, AnswerType, Settings


class AnswerConfig(Settings):
    """The form of answers, and the field of a row that contains the right answer."""

    type: AnswerType = "free"
    """The form of an answer in a completion. `choice`: one of the letters `choices`; `date`: in dates of numbers only,
    the month comes before the day; `free`: text up to the end of its line."""
    choices: AnswerChoices = "ABCDE"
    """The letters of type `choice`."""
    field: str = "answer"
    """The row's field with the right answer."""
    pattern: AnswerPattern | None = None
    """A regular expression with one group that finds the answer in that field, such as '#### (.+)'; the last match
    counts. `null`: the whole field."""


Scorer = Annotated[str, Field(pattern=rf"^(mean_logprob|answer|{FUNCTION_PATTERN[1:-1]})$")]
