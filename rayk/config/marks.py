"""Read the marks on fields of settings (`LocalPath`, `StoragePath`, `Placement`, `Selection`), and compare settings."""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from rayk.config.base import Settings


def _parts(annotation: Any) -> Iterator[Any]:
    """Yield the annotation itself and all types inside its brackets."""
    yield annotation
    for argument in get_args(annotation):
        yield from _parts(argument)


def sections_in(field: FieldInfo) -> list[type[Settings]]:
    """Return the sections that a field may contain: one, or one for each kind."""
    return [part for part in _parts(field.annotation) if isinstance(part, type) and issubclass(part, Settings)]


@functools.cache
def marked_fields(section: type[Settings], mark: type, place: str = "") -> Mapping[str, Any]:
    """Find all fields below `section` with a mark of this type.

    Returns:
        The place of each field, such as "teachers.engine.device" (without positions in lists), with its mark.
    """
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        here = f"{place}.{name}".lstrip(".")
        marks = [part for part in (*field.metadata, *_parts(field.annotation)) if isinstance(part, mark)]
        if marks:
            found[here] = marks[0]
        for inner in sections_in(field):
            found |= marked_fields(inner, mark, here)
    return found


def map_places(values: Any, places: Set[str], change: Callable[[str, str], str], place: str = "") -> Any:
    """Return a copy of plain settings in which `change(place, text)` replaces the texts at `places`."""
    if isinstance(values, dict):
        return {key: map_places(value, places, change, f"{place}.{key}".lstrip(".")) for key, value in values.items()}
    if isinstance(values, list):
        return [map_places(value, places, change, place) for value in values]
    return change(place, values) if isinstance(values, str) and place in places else values


def difference(before: Any, now: Any, ignored: Set[str], place: str = "") -> str | None:
    """Return the first place ("a.b") at which two settings, as plain values, differ, except for the `ignored` places;
    None if there is none."""
    if place in ignored or before == now:
        return None
    if isinstance(before, dict) and isinstance(now, dict):
        inside = [(before.get(key), now.get(key), f"{place}.{key}".lstrip(".")) for key in before | now]
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        inside = [(old, new, place) for old, new in zip(before, now, strict=True)]
    else:
        return place
    return next(filter(None, (difference(old, new, ignored, where) for old, new, where in inside)), None)


def sections_below(base: type[Settings]) -> Iterator[type[Settings]]:
    """Yield all classes derived from a section's base class."""
    for section in base.__subclasses__():
        yield section
        yield from sections_below(section)


@functools.cache
def all_places(section: type[Settings], place: str = "") -> tuple[str, ...]:
    """Return the places of all fields below `section`, such as "teachers.engine.device" (no positions in lists)."""
    found: dict[str, None] = {}
    for name, field in section.model_fields.items():
        here = f"{place}.{name}".lstrip(".")
        found[here] = None
        for inner in sections_in(field):
            found |= dict.fromkeys(all_places(inner, here))
    return tuple(found)


@dataclass(frozen=True)
class FieldTypes:
    """The types that a field accepts."""

    accepts_text: bool
    accepts_truth_values: bool
    accepts_sections: bool
    """The field accepts a mapping or a list."""
    accepts_anything: bool


def fields_at(section: type[Settings], place: str) -> list[FieldTypes]:
    """Return the types that the fields at a place accept, one entry for each kind of section that has such a field. A
    place inside a mapping with free keys accepts anything."""
    name, _, rest = place.partition(".")
    field = section.model_fields.get(name)
    if field is None:
        return []
    parts = list(_parts(field.annotation))
    if not rest:
        containers = [get_origin(part) or part for part in parts]
        mappings = any(part in (dict, list, tuple) for part in containers) or bool(sections_in(field))
        return [FieldTypes(str in parts, bool in parts, mappings, Any in parts)]
    found = [types for inner in sections_in(field) for types in fields_at(inner, rest)]
    return found or ([FieldTypes(True, True, True, True)] if dict in [get_origin(part) for part in parts] else [])


def support_keys(section: type[Settings], place: str, kinds: Collection[Any]) -> list[str]:
    """Return the keys of the support at a place; if several kinds of support are possible, of the one in `kinds`."""
    name, _, rest = place.partition(".")
    field = section.model_fields.get(name)
    if field is None:
        return []
    if rest:
        return next(filter(None, (support_keys(inner, rest, kinds) for inner in sections_in(field))), [])
    supports = [part for part in _parts(field.annotation) if isinstance(part, type) and is_dataclass(part)]
    named = [support for support in supports if getattr(support, "kind", None) in kinds] or supports
    return [each.name for each in fields(named[0])] if named else []
