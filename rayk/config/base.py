"""The base class of all settings sections, field types that several sections share, and marks on fields."""

import difflib
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

FUNCTION_PATTERN = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
FunctionPath = Annotated[str, Field(pattern=FUNCTION_PATTERN)]
"""'module:name' of a user's function."""
ClassPath = Annotated[str, Field(pattern=rf"{FUNCTION_PATTERN}|^[A-Za-z_][\w.-]*$")]
"""'module:name' of a user's class, or the name of an entry point."""


def _check_one_group(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is not a regular expression: {error}") from error
    if groups != 1:
        raise ValueError(f"needs exactly one group, it has {groups}")
    return pattern


AnswerPattern = Annotated[str, AfterValidator(_check_one_group)]
"""A regular expression with exactly one group."""
AnswerType = Literal["number", "choice", "yes_no", "date", "free"]
"""The forms of answers that `rayk.text.answers` finds in a text."""
AnswerChoices = Annotated[str, Field(pattern=r"^[A-Z]{2,}$")]
"""The letters of answers of type `choice`."""


@dataclass(frozen=True)
class LocalPath:
    """Mark on a field: a local path that the run reads, or the name of a model or data set on the Hugging Face hub. In
    a YAML file, relative paths are relative to the file's folder."""


@dataclass(frozen=True)
class StoragePath:
    """Mark on a field: a folder that the run writes to, or a URI. Relative paths are relative to the current folder."""


@dataclass(frozen=True)
class Placement:
    """Mark on a field or section: it decides where and how fast a run computes, not what is trained. It may change when
    a run is resumed."""


@dataclass(frozen=True)
class Selection:
    """Mark on a field of a synthesis: it decides which completions become training rows, but changes no request for a
    completion. It may change while the completions already stored stay valid."""


InputPath = Annotated[str, LocalPath()]


def default_kind(kind: str) -> BeforeValidator:
    """Return a validator for a section with several kinds: settings without the key `kind` get this one."""
    return BeforeValidator(lambda value: {"kind": kind} | value if isinstance(value, dict) else value)


def closest(name: str, known: Any, cutoff: float = 0.5) -> str | None:
    """Return the entry of `known` most similar to `name`; None if none is similar."""
    if len(name) > 60:  # the comparison takes time quadratic in the length
        return None
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return found[0] if found else None


class Settings(BaseModel):
    """Base of every section. Unknown keys are rejected with the closest valid name."""

    model_config = ConfigDict(
        extra="forbid", validate_default=True, protected_namespaces=(), use_attribute_docstrings=True
    )

    @model_validator(mode="wrap")
    @classmethod
    def _explain_unknown_keys(cls, values: Any, validate: Any) -> Any:
        try:
            return validate(values)
        except ValidationError as error:
            lines = [cls._explained(line) for line in error.errors(include_url=False)]
            raise ValidationError.from_exception_data(cls.__name__, lines) from error

    @classmethod
    def _explained(cls, line: Any) -> InitErrorDetails:
        details: InitErrorDetails = {"type": line["type"], "loc": line["loc"], "input": line["input"]}
        if line["type"] == "extra_forbidden" and len(line["loc"]) == 1:
            details["type"] = unknown_key(str(line["loc"][0]), cls.model_fields)
        elif line["type"] in _CUSTOM_ERRORS:
            details["type"] = PydanticCustomError(line["type"], "{sentence}", line["ctx"])
        elif "ctx" in line:
            details["ctx"] = line["ctx"]
        return details


UNKNOWN_KEY = "unknown_key"
_CUSTOM_ERRORS = {UNKNOWN_KEY}


def unknown_key(key: str, known: Any) -> PydanticCustomError:
    """The error for a key that is none of `known`."""
    near = closest(key, known)
    hint = f"did you mean '{near}'? " if near else ""
    sentence = f"unknown key '{shorten(key)}'; {hint}Allowed: {', '.join(known)}"
    return PydanticCustomError(UNKNOWN_KEY, "{sentence}", {"sentence": sentence, "key": key, "known": list(known)})


def shorten(text: str, length: int = 60) -> str:
    """Cut a text to at most `length` characters."""
    return text if len(text) <= length else f"{text[: length - 1]}…"
