"""What every section of the settings has in common."""

import difflib
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


def _has_one_group(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"is not a regular expression: {error}") from error
    if groups != 1:
        raise ValueError(f"needs exactly one group, it has {groups}")
    return pattern


AnswerPattern = Annotated[str, AfterValidator(_has_one_group)]
"""A regular expression whose one group is what it finds."""


FUNCTION_PATTERN = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
"""'module:name'."""
FunctionPath = Annotated[str, Field(pattern=FUNCTION_PATTERN)]
"""'module:name' of a function of the user's."""
ClassPath = Annotated[str, Field(pattern=rf"{FUNCTION_PATTERN}|^[A-Za-z_][\w.-]*$")]
"""'module:name' of a class of the user's, or the name of an entry point."""


class Settings(BaseModel):
    """Base of every section: no unknown keys, and a misspelt one is told the nearest."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())

    @classmethod
    def allows(cls, values: dict) -> bool:
        """Whether these values may have keys that the section does not name."""
        return False

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, values: Any) -> Any:
        if isinstance(values, dict) and not cls.allows(values):
            unknown = [key for key in values if key not in cls.model_fields]
            if unknown:
                near = difflib.get_close_matches(str(unknown[0]), cls.model_fields, n=1, cutoff=0.5)
                hint = f"did you mean '{near[0]}'?" if near else f"it may hold: {', '.join(cls.model_fields)}."
                raise ValueError(f"unknown key '{unknown[0]}'; {hint}")
        return values
