"""The reference of all settings: every key with its type, default and description, generated from the sections."""

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rayk.config.base import closest, shorten
from rayk.config.run import RunConfig
from rayk.errors import InputError


@dataclass(frozen=True)
class Setting:
    """One key of a section."""

    key: str
    type: str
    default: str
    """Empty for a section, because its keys have their own defaults."""
    description: str


@dataclass(frozen=True)
class Section:
    """One section, or one kind of a section that has several."""

    place: str
    """The keys that lead to the section, such as "data.train"; empty for the top level."""
    kind: str | None
    description: str
    settings: list[Setting]
    same_as: str | None = None
    """The place of another section with the same keys, which are listed there; `settings` is then empty."""

    @property
    def title(self) -> str:
        """The place and the kind."""
        kind = f"kind: {self.kind}" if self.kind else ""
        return f"{self.place} ({kind})" if self.place and kind else self.place or "Top level"


def find_sections(place: str | None = None) -> list[Section]:
    """Return the sections at and below a place such as "data" or "method.on_policy"; by default all.

    Raises:
        InputError: there is no such section.
    """
    found_first: dict[tuple[str, str | None, str], Section] = {}
    for section in _walk(_schema(), "", None, {}):
        found_first.setdefault((section.place, section.kind, section.description), section)
    sections = list(found_first.values())
    if place is None:
        return sections
    parent, _, kind = place.rpartition(".")
    found = [each for each in sections if (each.place, each.kind) == (parent, kind)]
    found = found or [each for each in sections if each.place == place or each.place.startswith(f"{place}.")]
    if not found:
        places = list(dict.fromkeys(each.place for each in sections if each.place))
        near = closest(place, places)
        hint = f"did you mean '{near}'? " if near else ""
        top = ", ".join(each for each in places if "." not in each)
        raise InputError(f"There is no section '{shorten(place)}'; {hint}Sections: {top}.")
    # Where a section repeats another one that is not shown, its own keys are listed.
    shown = {each.place for each in found}
    return [_filled(each) if each.same_as and each.same_as not in shown else each for each in found]


@functools.cache
def _schema() -> dict[str, Any]:
    return RunConfig.model_json_schema()


def _definition(reference: str) -> dict[str, Any]:
    return _schema()["$defs"][reference.rpartition("/")[2]]


def _filled(section: Section) -> Section:
    """Return the section with the keys of the section that it repeats."""
    same = next(s for s in find_sections() if s.place == section.same_as and s.kind == section.kind and not s.same_as)
    return Section(section.place, section.kind, section.description, same.settings)


def _walk(schema: dict[str, Any], place: str, kind: str | None, seen: dict[str, str]) -> Iterator[Section]:
    """Yield a section and the sections inside it. `seen` has the place of each definition that is listed already."""
    name = schema["title"]
    if name in seen:
        yield Section(place, kind, _text(schema), [], same_as=seen[name])
        return
    seen[name] = place
    properties = schema.get("properties", {})
    required = schema.get("required", ())
    yield Section(place, kind, _text(schema), [_setting(key, properties[key], key in required) for key in properties])
    for key, value in properties.items():
        for reference in _references(value):
            inner = _definition(reference)
            is_one_of_several = len(_references(value)) > 1
            inner_kind = inner["properties"]["kind"]["const"] if is_one_of_several else None
            yield from _walk(inner, f"{place}.{key}".lstrip("."), inner_kind, seen)


def _references(schema: dict[str, Any]) -> list[str]:
    """Return the references to the definitions of the sections that a value may be."""
    if "$ref" in schema:
        return [schema["$ref"]]
    parts = [*schema.get("anyOf", ()), *schema.get("oneOf", ()), *([schema["items"]] if "items" in schema else [])]
    return list(dict.fromkeys(reference for part in parts for reference in _references(part)))


def _setting(key: str, schema: dict[str, Any], required: bool) -> Setting:
    text = _text(schema) or " ".join(_text(_definition(reference)) for reference in _references(schema))
    return Setting(key, _type(schema), _default(schema, required), text)


def _text(schema: dict[str, Any]) -> str:
    return " ".join(schema.get("description", "").split())


def _default(schema: dict[str, Any], required: bool) -> str:
    if required:
        return "required"
    default = schema.get("default", {})
    if default == {} or (isinstance(default, dict) and _references(schema)):
        return ""  # a section with the defaults of its own keys
    return shorten(default if isinstance(default, str) else json.dumps(default, ensure_ascii=False), 48)


_NAMES = {"string": "text", "boolean": "true or false", "integer": "integer", "number": "number", "null": "null"}


def _type(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " or ".join(str(value) for value in schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    if references := _references(schema):
        several = " by kind" if len(references) > 1 else ""
        prefix = "list of sections" if schema.get("type") == "array" else "section"
        return " or ".join([f"{prefix}{several}", *_others(schema)])
    if parts := [*schema.get("anyOf", ()), *schema.get("oneOf", ())]:
        return " or ".join(dict.fromkeys(_type(part) for part in parts))
    if schema.get("type") == "array":
        items = schema.get("items") or (schema.get("prefixItems") or [{}])[0]
        number = f"{schema['maxItems']} × " if "prefixItems" in schema else ""
        return f"list of {number}{_type(items)}"
    if schema.get("type") == "object":
        values = schema.get("additionalProperties")
        return f"mapping to {_type(values)}" if isinstance(values, dict) else "mapping"
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[name]:g}" for name, sign in limits.items() if name in schema]
    return " ".join([_NAMES.get(schema.get("type", ""), "any value"), ", ".join(bounds)]).strip()


def _others(schema: dict[str, Any]) -> list[str]:
    """Return the types other than sections that a value may have."""
    parts = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
    return [_type(part) for part in parts if not _references(part)]
