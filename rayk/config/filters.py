"""The filters of quality control, told apart by `kind`: what is left out of what teachers write."""

import re
import string
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from rayk.config.base import AnswerPattern, FunctionPath, Positive, Settings, Share


class FieldFilterConfig(Settings):
    """What filters of one field share."""

    field: str = "completion"
    """Which field of the candidate is judged: `prompt`, `completion`, or one that the recipe adds. Of a pair
    `completion` is the chosen answer, `rejected` the other."""


class EmptyFilterConfig(FieldFilterConfig):
    """Rejects what has no visible character."""

    kind: Literal["empty"] = "empty"


class TruncatedFilterConfig(Settings):
    """Rejects completions that were cut at the token limit (`finish_reason` is 'length')."""

    kind: Literal["truncated"] = "truncated"


class LengthFilterConfig(FieldFilterConfig):
    """Rejects what is shorter or longer; of scripts without spaces a word is a character."""

    kind: Literal["length"] = "length"
    unit: Literal["words", "characters", "tokens"] = "words"
    """`tokens`: those that the teacher counted of its completion, whatever `field` says."""
    minimum: Annotated[int, Field(ge=0)] = 1
    maximum: Positive | None = None

    @model_validator(mode="after")
    def _can_be_met(self) -> "LengthFilterConfig":
        if self.maximum is not None and self.maximum < self.minimum:
            raise ValueError(f"filter 'length': maximum ({self.maximum}) is below minimum ({self.minimum})")
        return self


class LanguageFilterConfig(FieldFilterConfig):
    """Rejects what is in another language (py3langid). Text too short or too mixed to tell is kept."""

    kind: Literal["language"] = "language"
    languages: Annotated[list[str], Field(min_length=1)]
    """ISO 639-1 codes: en, zh, de, …"""
    margin: Annotated[float, Field(ge=1)] = 10.0
    """How many times likelier another language must be than those wanted together."""


class RepetitionFilterConfig(FieldFilterConfig):
    """Rejects what goes round in circles: too many of its n-grams of words repeat earlier ones, or too much of it is
    one character over and over."""

    kind: Literal["repetition"] = "repetition"
    n: Positive = 4
    maximum: Share = 0.3
    """The largest share of repeated n-grams, or of one run of one character, that is kept."""


class RefusalFilterConfig(FieldFilterConfig):
    """Rejects answers that begin by refusing (the patterns in `rayk.text.refusals`)."""

    kind: Literal["refusal"] = "refusal"
    patterns: list[str] = Field(default_factory=list)
    """Regular expressions beside the built-in ones, sought in the beginning of the answer in lower case."""

    @field_validator("patterns")
    @classmethod
    def _compile(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from error
        return patterns


class KeywordsFilterConfig(FieldFilterConfig):
    """Rejects what has one of the words or phrases in it, as whole words whatever their case; of scripts without
    spaces, anywhere."""

    kind: Literal["keywords"] = "keywords"
    keywords: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]


class EndingFilterConfig(FieldFilterConfig):
    """Rejects what ends as if something were to follow, white space aside."""

    kind: Literal["ending"] = "ending"
    endings: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] = (":", "：")


class ContaminationFilterConfig(Settings):
    """Rejects what shares a run of words with a prompt of the evaluation set (GPT-3, arXiv 2005.14165 appendix C). A
    shorter evaluation prompt rejects only a field that is the same, word for word."""

    kind: Literal["contamination"] = "contamination"
    n: Positive = 13
    """Words in the run; of scripts without spaces, characters."""
    fields: Annotated[tuple[str, ...], Field(min_length=1)] = ("prompt", "completion")


class NearDuplicatesFilterConfig(Settings):
    """Rejects what is nearly the same as a candidate kept before: Jaccard similarity of their sets of word n-grams,
    whose pairs are found by MinHash (datasketch)."""

    kind: Literal["near_duplicates"] = "near_duplicates"
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.8
    """The similarity from which on a candidate is a duplicate."""
    n: Positive = 3
    permutations: Annotated[int, Field(ge=16)] = 128
    """Hashes of each text: more of them miss fewer pairs near the threshold and take more memory, 8 bytes each."""
    fields: Annotated[tuple[str, ...], Field(min_length=1)] = ("prompt", "completion")
    """Compared together as one text."""


class RougeFilterConfig(Settings):
    """Rejects what has ROUGE-L F ≥ `threshold` to a candidate kept before (Self-Instruct, arXiv 2212.10560 §2.2)."""

    kind: Literal["rouge"] = "rouge"
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.7
    field: str = "prompt"


class CustomFilterConfig(Settings):
    """Asks a function of the user's: it is given the candidate (a mapping of fields) and returns None to keep it, or
    the reason for leaving it out as text."""

    kind: Literal["custom"] = "custom"
    function: FunctionPath
    """'module:name'; the module is looked for where rayk was started, too."""


def _fields_alone(template: str) -> str:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"is not a template: {error}; write {{{{ and }}}} for literal braces") from error
    names = [name for _, name, _, _ in parts if name is not None]
    wrong = next((name for name in names if not name.isidentifier()), None)
    if wrong is not None or not names:
        said = f"has {{{wrong}}}" if names else "names no field"
        raise ValueError(f"{said}; name fields of the row in it, such as {{prompt}} and {{completion}}")
    return template


class JudgeFilterConfig(Settings):
    """Has a model rate each row, and rejects what it rates low. It comes after the filters of text alone and before
    `keep`; what has no rating, because the model's reply has none or there is no reply, is rejected as such."""

    kind: Literal["judge"] = "judge"
    teacher: str | None = None
    """Which of `teachers` judges; by default the one that writes."""
    template: Annotated[str, AfterValidator(_fields_alone)] = (
        "Rate an answer to a task: is it right, does it do what was asked, is it clear?\n\nTask:\n{prompt}\n\nAnswer:\n"
        "{completion}\n\nSay in two sentences at most what is good and what is bad about it. Then write on a line of "
        "its own 'Score: ' and a number from 1 (useless) to 5 (could not be better)."
    )
    """What it is asked; {prompt}, {completion} (of a pair the better one; {chosen} and {rejected}, too) and the row's
    other fields are put in."""
    score_pattern: AnswerPattern = r"(?i)\bscore\W{0,5}(\d+(?:\.\d+)?)"
    """A regular expression with one group that finds the rating, a number, in the reply; the last match counts."""
    at_least: float = 4.0
    """The lowest rating that is kept."""
    max_new_tokens: Positive = 512
    """Longest reply, which is greedy."""
    chat: bool = True
    """Ask in the judge's chat template; an endpoint (engine kind `openai`) has its own `engine.chat`."""


_OfTexts = (
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
TextFilterConfig = Annotated[_OfTexts, Field(discriminator="kind")]
"""Those that need nothing but the candidates."""
FilterConfig = Annotated[_OfTexts | ContaminationFilterConfig | JudgeFilterConfig, Field(discriminator="kind")]
