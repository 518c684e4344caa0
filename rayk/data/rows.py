"""Rows as they are read from files."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One row: its fields, and its place for error messages ("train.jsonl, line 17")."""

    fields: Mapping[str, Any]
    where: str


class Unreadable(str):
    """The reason why the value of a field could not be read. It stands in place of the value, so that a row can be used
    as long as the field is not."""
