"""Load settings from YAML files, overrides and dicts; report all errors at once, each in one sentence."""

import logging
import os
import re
import reprlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rayk.config.base import FUNCTION_PATTERN, UNKNOWN_KEY, LocalPath, Settings, StoragePath, closest, shorten
from rayk.config.hints import KIND_NAMES, key_hint
from rayk.config.marks import all_places, fields_at, map_places, marked_fields, sections_below, support_keys
from rayk.config.paths import (
    RUN_CONFIG,
    absolute_path,
    expand_user,
    is_explicit_path,
    is_local_path,
    is_uri,
    path_exists,
    resolve_path,
)
from rayk.config.run import RunConfig
from rayk.config.secrets import MASK, hide, hide_named, masked_places, redact, remember_secrets
from rayk.config.support import SUPPORTS
from rayk.config.teachers import TeacherConfig
from rayk.config.yaml_text import parse_yaml
from rayk.errors import InputError, SettingsError

logger = logging.getLogger(__name__)

_BRANCH = re.compile(r"\[|^(str|int|float|bool|constrained-str)$")
"""Names that pydantic gives to the branches of a union in the location of an error."""

_NO_SECTION = ("model_type", "model_attributes_type", "dict_type", "dataclass_type")
"""pydantic's names for values in place of a section."""

_TYPES = {
    "int_parsing": "an integer", "int_type": "an integer", "int_from_float": "an integer", "float_parsing": "a number",
    "float_type": "a number", "bool_parsing": "true or false", "bool_type": "true or false", "string_type": "text",
    "list_type": "a list", "dict_type": "a mapping",
}  # fmt: skip
"""Types of values in words, by pydantic's name of the error."""

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 2, 60, 60


def load_config(path: str | os.PathLike, overrides: list[str] | None = None, **fields: Any) -> RunConfig:
    """Load a run's settings from a YAML file, and check them.

    Local paths in the file are relative to the file's folder; those in `overrides` and `fields`, and `output`, are
    relative to the current folder.

    Args:
        path: the YAML file, or a run directory, whose settings are read.
        overrides: settings to replace, as 'a.b=value' with the value in YAML; list items by number.
        fields: top-level settings to replace; None values are ignored.

    Raises:
        InputError: the file or an override cannot be read, or settings are wrong; each error is one sentence.
    """
    values = _read_values(path, overrides)
    values.update({name: value for name, value in fields.items() if value is not None})
    return parse_config(values, where=str(path))


def parse_config(values: dict[str, Any], where: str = "The config") -> RunConfig:
    """Check settings given as a dict; errors as `load_config`."""
    remember_secrets(values)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise SettingsError(where, list(dict.fromkeys(_sentences(error)))) from error


def load_teachers(path: str | os.PathLike, overrides: list[str] | None = None) -> list[TeacherConfig]:
    """Load only the teachers of a YAML file, whose other sections are not checked and may be missing.

    Args:
        overrides: see `load_config`.

    Raises:
        InputError: see `load_config`; also if there is no teacher, or two have the same name.
    """
    section = {"teachers": _read_values(path, overrides).get("teachers") or []}
    remember_secrets(section)
    try:
        teachers = TypeAdapter(dict[str, list[TeacherConfig]]).validate_python(section)["teachers"]
    except ValidationError as error:
        raise SettingsError(str(path), list(dict.fromkeys(_sentences(error)))) from error
    names = [teacher.name for teacher in teachers]
    if not names:
        raise InputError(f"{path} has no teachers; add one under 'teachers'.")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{path}: two teachers are named '{repeated[0]}'; give each its own name.")
    return teachers


def with_absolute_paths(config: RunConfig, output: str | None = None) -> RunConfig:
    """Return `config` with absolute local paths, because workers run in folders of their own.

    Args:
        output: the run directory, instead of the config's.
    """
    values = config.model_dump(mode="json")
    values["output"] = output if output and is_uri(output) else absolute_path(output or str(config.output_path))
    inputs, storage = marked_fields(RunConfig, LocalPath), marked_fields(RunConfig, StoragePath)
    values = map_places(values, inputs.keys(), lambda _, name: resolve_path(name))
    values = map_places(values, storage.keys(), lambda _, name: name if is_uri(name) else absolute_path(name))
    return parse_config(values)


def check_inputs_exist(config: RunConfig, *, training: bool = True) -> None:
    """Check that the local files and folders that a run reads exist.

    Args:
        training: also check what only training reads.

    Raises:
        InputError: a file or folder does not exist; the message names the setting and the absolute path.
    """
    values = config.model_dump(mode="json")
    if masked := masked_places(values):
        raise InputError(
            f"{masked[0]} is '{MASK}', which stands for a secret that a run directory does not store; set it, or use "
            "the config that the run was started with."
        )
    del values["teachers"]
    if not training:
        values["data"]["train"] = values["synthesis"] = values["method"] = None

    def check(place: str, name: str) -> str:
        if is_local_path(name) and not path_exists(name):
            raise InputError(f"{place}: '{absolute_path(name)}' does not exist; check the path.")
        return name

    for number, teacher in enumerate(config.teachers):
        # An attached teacher has loaded its model already, and an endpoint's name for its model is not a path.
        if teacher.model is not None and teacher.gives_signals and not teacher.attach:
            check(f"teachers.{number}.model", teacher.model)
    map_places(values, marked_fields(RunConfig, LocalPath).keys(), check)


def _read_values(path: str | os.PathLike, overrides: list[str] | None) -> dict[str, Any]:
    """Read a YAML file and apply overrides; see `load_config`."""
    path = Path(path)
    if path.is_dir():
        path = path / RUN_CONFIG
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"The config file '{path}' cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise InputError(f"The config file '{path}' is not YAML that rayk reads: {error}.") from error
    if not isinstance(values, dict):
        raise InputError(f"The config file '{path}' is empty or contains no settings; see jobs/ for examples.")
    assignments = [_Assignment.parse(override) for override in overrides or []]
    for assignment in assignments:
        assignment.clear(values)  # a path that is replaced is not looked for
    values = _relative_to_file(values, path)
    for assignment in assignments:
        assignment.apply(values)
    _drop_replaced(values, {assignment.key for assignment in assignments})
    return values


def _drop_replaced(values: dict[str, Any], overridden: set[str]) -> None:
    """Drop the file's `training.epochs` if `training.steps` is overridden, and the like: a run takes one of them."""
    pairs = (("steps", "epochs"), ("warmup_steps", "warmup_share"))
    for given, other in (*pairs, *(pair[::-1] for pair in pairs)):
        training = values.get("training")
        if f"training.{given}" in overridden and f"training.{other}" not in overridden and isinstance(training, dict):
            training.pop(other, None)


def _relative_to_file(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return the settings with local paths resolved relative to the folder of the config file."""
    folder = absolute_path(str(file.parent))
    if folder == os.getcwd():
        return values
    if folder not in sys.path:
        sys.path.append(folder)  # so that settings may name modules next to the file

    def resolve(place: str, name: str) -> str:
        if is_uri(name) or os.path.isabs(expand_user(name)):
            return name
        in_folder = absolute_path(name, folder)
        if path_exists(in_folder):
            return in_folder
        if path_exists(name):
            logger.warning(
                "%s: %s '%s' is not in the config file's folder '%s', but in the current folder. Write it relative to "
                "the config file ('%s'): the next release does not look in the current folder.",
                file, place, name, folder, os.path.relpath(name, folder),
            )  # fmt: skip
            return absolute_path(name)
        return in_folder if is_explicit_path(name) else name

    return map_places(values, marked_fields(RunConfig, LocalPath).keys(), resolve)


@dataclass(frozen=True)
class _Assignment:
    """An override of one setting.

    Attributes:
        text: the override as errors show it, without secrets.
    """

    key: str
    value: Any
    text: str

    @classmethod
    def parse(cls, override: str) -> "_Assignment":
        """Read 'a.b=value'."""
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise InputError(f"--set {hide(override)}: write it as a.b=value.")
        remember_secrets({key.rpartition(".")[2]: text})
        value = _override_value(override, key, text)
        remember_secrets(value)
        return cls(key, value, hide_named(override))

    def clear(self, values: dict[str, Any]) -> None:
        """Set the setting to None; see `apply`."""
        replace(self, value=None).apply(values)

    def apply(self, values: dict[str, Any]) -> None:
        """Set the setting in place; missing sections are created.

        Raises:
            InputError: there is no such place.
        """
        *parents, last = self.key.split(".")
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
            if isinstance(place, list):
                place[int(last)] = self.value
            else:
                place[last] = self.value
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            hint = " Items of a list are numbered, as in teachers.0.model." if isinstance(place, list) else ""
            raise InputError(f"--set {self.text}: there is no such place in the config.{hint}") from error


def _override_value(override: str, key: str, text: str) -> Any:
    """Parse an override's value as YAML, but keep it as text if the setting is a text, or if the value is a template
    that YAML would read as a mapping."""
    fields = fields_at(RunConfig, ".".join(part for part in key.split(".") if not part.isdigit()))
    is_text = bool(fields) and all(field.accepts_text and not field.accepts_sections for field in fields)
    is_template = re.search(r"\{\w+\}", text) is not None and not text.lstrip().startswith("{")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        if is_text or is_template or any(field.accepts_anything for field in fields):
            return text
        raise InputError(
            f"--set {hide_named(override)}: '{shorten(hide_named(text))}' is not a YAML value ({error}); quote it, or "
            "check its brackets."
        ) from error
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool) and any(field.accepts_truth_values for field in fields):
        return value
    return text if is_text or (is_template and isinstance(value, dict)) else value


def _kinds() -> set[str]:
    sections = sections_below(Settings)
    kinds = {section.model_fields["kind"].default for section in sections if "kind" in section.model_fields}
    return kinds | {support.kind for support in SUPPORTS}


def _keys(location: tuple[str | int, ...]) -> list[str]:
    """Return the keys of an error's location, without the names of union branches that pydantic adds."""
    kinds, places = _kinds(), all_places(RunConfig)
    keys: list[str] = []
    for part in location:
        place = ".".join(key for key in [*keys, str(part)] if not key.isdigit())
        parent = place.rpartition(".")[0]
        is_unknown = parent in places and place not in places
        is_kind = part in kinds and (f"{parent}.kind" in places or place not in places)  # a key may be named as a kind
        is_branch = is_kind or (is_unknown and _BRANCH.search(str(part)) is not None and part != "[key]")
        if not is_branch:
            keys.append(str(part))
    return keys


def _sentences(error: ValidationError) -> Iterator[str]:
    for line in error.errors(include_url=False):
        yield from _explain(line)


def _explain(line: Any) -> Iterator[str]:
    """Yield the sentences for one error of pydantic."""
    keys = _keys(line["loc"])
    message = line["msg"].removeprefix("Value error, ")
    kind = line["type"]
    if kind == "missing":
        message = "is missing; set it"
    elif kind == "union_tag_invalid":
        message = _unknown_kind(line["ctx"]["tag"], re.findall(r"'([^']+)'", line["ctx"]["expected_tags"]))
    elif kind == "union_tag_not_found":
        message = "needs a 'kind'"
    elif kind in (UNKNOWN_KEY, "dataclass_unexpected_keyword", "unexpected_keyword_argument", "extra_forbidden"):
        key = line["ctx"]["key"] if kind == UNKNOWN_KEY else keys[-1]
        keys = keys[:-1] if keys[-1:] == [key] else keys
        section = ".".join(part for part in keys if not part.isdigit())
        allowed = line["ctx"]["known"] if kind == UNKNOWN_KEY else support_keys(RunConfig, section, line["loc"])
        message = key_hint(key, section, allowed)
    elif keys and keys[-1] == "[key]":
        message, keys = f"the key {keys[-2]} is not text; put it in quotes", keys[:-2]
    elif kind == "string_pattern_mismatch" and FUNCTION_PATTERN[1:-1] in line["ctx"]["pattern"]:
        message = f"is {_shown(keys, line['input'])}; write it as 'module:name', such as my_file:my_name"
    elif kind in _NO_SECTION and (example := _example_of_section(keys, line["input"])):
        message = f"is {_shown(keys, line['input'])}, but must be a section, such as {{{example}}}"
    elif kind in _TYPES:
        message = f"is {_shown(keys, line['input'])}, but must be {_TYPES[kind]}"
    elif kind != "value_error":  # pydantic's own words, not ours
        message = f"{message[0].lower()}{message[1:]} (it is {_shown(keys, line['input'])})"
    place = ".".join(keys)
    for part in message.splitlines():
        joint = " " if part.startswith(("is ", "needs ", "takes ")) else ": "
        sentence = f"{place}{joint}{part}" if place else part
        yield sentence if sentence.endswith((".", "?")) else f"{sentence}."


def _example_of_section(keys: list[str], value: Any) -> str:
    """Return what could stand in place of a value that is no section; empty if the place has no keys of rayk's."""
    if isinstance(value, str) and value in _kinds():
        return f"kind: {value}"
    section = ".".join(key for key in keys if not key.isdigit())
    parents = (place.rpartition(".") for place in all_places(RunConfig))
    return next((f"{name}: …" for parent, _, name in parents if parent == section), "")


def _shown(keys: list[str], value: Any) -> str:
    """Return a wrong value as an error shows it."""
    return _REPR.repr(next(iter(redact({keys[-1] if keys else "": value}).values())))


def _unknown_kind(tag: str, known: list[str]) -> str:
    near = KIND_NAMES.get(tag) if KIND_NAMES.get(tag) in known else closest(tag, known, cutoff=0.4)
    hint = f"did you mean '{near}'? " if near else ""
    return f"unknown kind '{shorten(tag)}'; {hint}Known: {', '.join(known)}"
