"""Filters of generated rows, chosen by `kind`: each rejects candidates for training rows."""

import re
import string
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from rayk.config.base import AnswerPattern, FunctionPath, Positive, Settings, Share


class FilterSettings(Settings):
    """Base of all filters. Its attributes tell the other sections what the filter reads."""

    compares_evaluation_prompts: ClassVar[bool] = False
    """True if the filter compares candidates with the evaluation prompts."""

    @property
    def counts_tokens(self) -> bool:
        """Return whether the filter reads the number of tokens that a teacher generated."""
        return False

    def judge_teacher(self, default: str) -> str | None:
        """Return the name of the teacher that the filter queries; None if it queries none.

        Args:
            default: the name of the teacher that generates the rows.
        """
        return None


class FieldFilterConfig(FilterSettings):
    """Base of filters that read one field."""

    field: str = "completion"
    """The field of the candidate that is read: `prompt`, `completion`, or a field that the recipe adds. For a
    preference pair, `completion` is the chosen answer and `rejected` the other one."""


class EmptyFilterConfig(FieldFilterConfig):
    """Rejects text without a visible character."""

    kind: Literal["empty"] = "empty"
    """The filter's kind."""


class TruncatedFilterConfig(FilterSettings):
    """Rejects completions that were cut at the token limit (`finish_reason` is 'length')."""

    kind: Literal["truncated"] = "truncated"
    """The filter's kind."""


class LengthFilterConfig(FieldFilterConfig):
    """Rejects text that is too short or too long. In scripts without spaces, each character counts as a word."""

    kind: Literal["length"] = "length"
    """The filter's kind."""
    unit: Literal["words", "characters", "tokens"] = "words"
    """The unit of both limits; `tokens`: the teacher's own count for the completion, and `field` is ignored."""
    minimum: Annotated[int, Field(ge=0)] = 1
    """Smallest length that is accepted."""
    maximum: Positive | None = None
    """Largest length that is accepted; `null`: no limit."""

    @property
    def counts_tokens(self) -> bool:
        return self.unit == "tokens"

    @model_validator(mode="after")
    def _check_order(self) -> "LengthFilterConfig":
        if self.maximum is not None and self.maximum < self.minimum:
            raise ValueError(f"filter 'length': maximum ({self.maximum}) is below minimum ({self.minimum})")
        return self


class LanguageFilterConfig(FieldFilterConfig):
    """Rejects text in other languages, detected by py3langid. Text is accepted if its language is uncertain because it
    is short or mixed."""

    kind: Literal["language"] = "language"
    """The filter's kind."""
    languages: Annotated[list[str], Field(min_length=1)]
    """ISO 639-1 codes of the accepted languages, such as en, zh or de."""
    margin: Annotated[float, Field(ge=1)] = 10.0
    """Text is rejected if another language is more likely than all `languages` together by this factor."""


class RepetitionFilterConfig(FieldFilterConfig):
    """Rejects repetitive text: too many of its word n-grams occurred earlier in it, or too much of it is a sequence of
    one repeated character."""

    kind: Literal["repetition"] = "repetition"
    """The filter's kind."""
    n: Positive = 4
    """Words per n-gram."""
    maximum: Share = 0.3
    """Largest accepted share of repeated n-grams, and of one repeated character."""


class RefusalFilterConfig(FieldFilterConfig):
    """Rejects answers that begin with a refusal (the patterns in `rayk.text.refusals`)."""

    kind: Literal["refusal"] = "refusal"
    """The filter's kind."""
    patterns: list[str] = Field(default_factory=list)
    """More regular expressions, searched in the beginning of the answer after it is converted to lower case."""

    @field_validator("patterns")
    @classmethod
    def _compile(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from error
        return patterns


class KeywordsFilterConfig(FieldFilterConfig):
    """Rejects text that contains one of the words or phrases, in upper or lower case. They match whole words only,
    except in scripts without spaces."""

    kind: Literal["keywords"] = "keywords"
    """The filter's kind."""
    keywords: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    """The words or phrases."""


class EndingFilterConfig(FieldFilterConfig):
    """Rejects text that ends as if more text should follow, by default with a colon. White space at the end is
    ignored."""

    kind: Literal["ending"] = "ending"
    """The filter's kind."""
    endings: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] = (":", "：")
    """The endings that are rejected."""


class ContaminationFilterConfig(FilterSettings):
    """Rejects candidates that share a sequence of `n` words with a prompt of the evaluation set (GPT-3, arXiv
    2005.14165, appendix C). An evaluation prompt with fewer words rejects only fields with exactly the same words."""

    compares_evaluation_prompts: ClassVar[bool] = True

    kind: Literal["contamination"] = "contamination"
    """The filter's kind."""
    n: Positive = 13
    """Number of words in the sequence; in scripts without spaces, of characters."""
    fields: Annotated[tuple[str, ...], Field(min_length=1)] = ("prompt", "completion")
    """The fields of the candidate that are read."""


class NearDuplicatesFilterConfig(FilterSettings):
    """Rejects candidates that are similar to an earlier accepted candidate, by the Jaccard similarity of their sets of
    word n-grams. Similar pairs are found by MinHash (datasketch)."""

    kind: Literal["near_duplicates"] = "near_duplicates"
    """The filter's kind."""
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Smallest similarity that makes a candidate a duplicate."""
    n: Positive = 3
    """Words per n-gram."""
    permutations: Annotated[int, Field(ge=16)] = 128
    """Number of hashes per text, of 8 bytes each; with more hashes, fewer pairs near the threshold are missed."""
    fields: Annotated[tuple[str, ...], Field(min_length=1)] = ("prompt", "completion")
    """The fields that are compared, joined into one text."""


class RougeFilterConfig(FilterSettings):
    """Rejects candidates that have a ROUGE-L F score ≥ `threshold` with an earlier accepted candidate (Self-Instruct,
    arXiv 2212.10560, §2.2)."""

    kind: Literal["rouge"] = "rouge"
    """The filter's kind."""
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Smallest score that is rejected."""
    field: str = "prompt"
    """The field that is compared."""


class CustomFilterConfig(FilterSettings):
    """Your own function, called as `function(candidate)` with a mapping of the candidate's fields. It returns None to
    accept the candidate, or the reason for the rejection as text."""

    kind: Literal["custom"] = "custom"
    """The filter's kind."""
    function: FunctionPath
    """The function as 'module:name'. The module may be a file next to the config file."""


def _check_field_names(template: str) -> str:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"is not a template: {error}; write {{{{ and }}}} for literal braces") from error
    names = [name for _, name, _, _ in parts if name is not None]
    wrong = next((name for name in names if not name.isidentifier()), None)
    if wrong is not None or not names:
        found = f"has {{{wrong}}}" if names else "names no field"
        raise ValueError(f"{found}; name fields of the row in it, such as {{prompt}} and {{completion}}")
    return template


class JudgeFilterConfig(FilterSettings):
    """Rejects rows to which a model gives a low rating. It runs after the filters that only read text, and before
    `keep`. Rows without a rating are rejected too: the model sent no reply, or a reply without a rating."""

    kind: Literal["judge"] = "judge"
    """The filter's kind."""
    teacher: str | None = None
    """Which of `teachers` is the judge; `null`: the teacher that generates the rows."""
    template: Annotated[str, AfterValidator(_check_field_names)] = (
        "Rate an answer to a task: is it right, does it do what was asked, is it clear?\n\nTask:\n{prompt}\n\nAnswer:\n"
        "{completion}\n\nSay in two sentences at most what is good and what is bad about it. Then write on a line of "
        "its own 'Score: ' and a number from 1 (useless) to 5 (could not be better)."
    )
    """The judge's prompt, with {prompt}, {completion} (for a pair the better answer, also {chosen} and {rejected}) and
    the row's other fields."""
    score_pattern: AnswerPattern = r"(?i)\bscore\W{0,5}(\d+(?:\.\d+)?)"
    """A regular expression with one group that finds the rating, a number, in the reply; the last match counts."""
    at_least: float = 4.0
    """Lowest rating that is accepted."""
    max_new_tokens: Positive = 512
    """Longest reply in tokens, decoded greedily."""
    chat: bool = True
    """Wrap the prompt in the judge's chat template. For an endpoint (engine kind `openai`), `engine.chat` decides."""

    def judge_teacher(self, default: str) -> str | None:
        return self.teacher or default


_TextFilters = (
    EmptyFilterConfig
    | TruncatedFilterConfig
    | LengthFilterConfig
    | LanguageFilterConfig
    | RepetitionFilterConfig
    | RefusalFilterConfig
    | KeywordsFilterConfig
    | EndingFilterConfig
    | NearDuplicatesFilterConfig
    | RougeFilterConfig
    | CustomFilterConfig
)
TextFilterConfig = Annotated[_TextFilters, Field(discriminator="kind")]
"""A filter that reads only candidates: no evaluation prompts, and no model's ratings."""
FilterConfig = Annotated[_TextFilters | ContaminationFilterConfig | JudgeFilterConfig, Field(discriminator="kind")]
