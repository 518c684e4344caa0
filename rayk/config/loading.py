"""Settings from YAML files, overrides and dicts; whatever is wrong with them in one sentence."""

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rayk.config.base import Settings
from rayk.config.run import RunConfig
from rayk.config.support import SUPPORTS
from rayk.errors import InputError


def _sections(base: type[Settings]) -> Iterator[type[Settings]]:
    for section in base.__subclasses__():
        yield section
        yield from _sections(section)


_KINDS = {
    *(section.model_fields["kind"].default for section in _sections(Settings) if "kind" in section.model_fields),
    *(each.kind for each in SUPPORTS),
}


def load_config(path: str | os.PathLike, overrides: list[str] | None = None, **fields: Any) -> RunConfig:
    """Read a YAML file, apply `a.b=value` overrides (list items by number) and top-level `fields`, and check it all.

    Raises:
        InputError: one sentence on the first thing that is wrong.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"The config file '{path}' cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"The config file '{path}' is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InputError(f"The config file '{path}' is empty or holds no settings; see jobs/ for examples.")
    for override in overrides or []:
        _apply_override(values, override)
    values.update({name: value for name, value in fields.items() if value is not None})
    return parse_config(values, where=str(path))


def parse_config(values: dict[str, Any], where: str = "The config") -> RunConfig:
    """Check settings given as a dict; errors as `load_config`."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{where}: {_sentence(error)}") from error


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InputError(f"--set {override}: write it as a.b=value.")
    *parents, last = key.split(".")
    place: Any = values
    try:
        for part in parents:
            if isinstance(place, list):
                place = place[int(part)]
            else:
                if place.get(part) is None:
                    place[part] = {}
                place = place[part]
                if not isinstance(place, dict | list):
                    raise TypeError
        value = yaml.safe_load(text)
        if isinstance(place, list):
            place[int(last)] = value
        else:
            place[last] = value
    except (TypeError, ValueError, IndexError, yaml.YAMLError) as error:
        raise InputError(f"--set {override}: there is no such place in the config.") from error


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    # Union branches put the branch's name in the location; a user knows only the keys.
    place = ".".join(str(part) for part in first["loc"] if part not in _KINDS)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        message = "is missing; set it"
    elif first["type"] == "union_tag_invalid":
        tag = first["ctx"]["tag"]
        known = re.findall(r"'([^']+)'", first["ctx"]["expected_tags"])
        near = difflib.get_close_matches(tag, known, n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'? " if near else ""
        message = f"unknown kind '{tag}'; {hint}Known: {', '.join(known)}"
    elif first["type"] == "union_tag_not_found":
        message = "needs a 'kind'"
    elif first["type"] in ("dataclass_unexpected_keyword", "unexpected_keyword_argument", "extra_forbidden"):
        message = f"unknown key '{first['loc'][-1]}'"
        place = ".".join(place.split(".")[:-1])
    elif first["type"] != "value_error":  # pydantic's own words, not ours
        message = f"{message[0].lower()}{message[1:]} (it is {first['input']!r})"
    joint = " " if message.startswith(("is ", "needs ", "takes ")) else ": "
    sentence = f"{place}{joint}{message}" if place else message
    return sentence if sentence.endswith((".", "?")) else f"{sentence}."
