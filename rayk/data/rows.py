"""Rows as they are read from files."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from rayk.errors import InputError

LONGEST_ROW_BYTES = 256 << 20
"""Longest row in a text file. A compressed file of a few megabytes can contain a line that fills any memory."""


@dataclass(frozen=True)
class Row:
    """One row: its fields, and its place for error messages ("train.jsonl, line 17")."""

    fields: Mapping[str, Any]
    where: str


class Unreadable(str):
    """The reason why the value of a field could not be read. It stands in place of the value, so that a row can be used
    as long as the field is not."""


def read_lines(file: BinaryIO, name: str) -> Iterator[bytes]:
    """Yield the lines of a file.

    Raises:
        InputError: a line is longer than `LONGEST_ROW_BYTES`.
    """
    number = 0
    while line := file.readline(LONGEST_ROW_BYTES + 1):
        number += 1
        if len(line) > LONGEST_ROW_BYTES:
            raise too_long(f"{name}, line {number}")
        yield line


def too_long(where: str) -> InputError:
    """Return the error for a row that is too long."""
    return InputError(f"{where} is longer than {LONGEST_ROW_BYTES >> 20} MB; check the file, or divide the row.")
