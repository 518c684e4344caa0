"""Read rows from CSV and TSV files: a header with the names of the fields, and a text for each field of a row."""

import csv
import itertools
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from rayk.data.rows import LONGEST_ROW_BYTES, Row, read_lines
from rayk.errors import InputError

_DELIMITERS = (",", ";", "\t", "|")


def read_csv(file: BinaryIO, name: str, delimiter: str | None = None) -> Iterator[Row]:
    """Yield the rows of a CSV file; fields in double quotes may contain delimiters and line breaks.

    Args:
        name: name of the file in messages.
        delimiter: the character between fields; None: the one of , ; | and tab with which the header has most fields.

    Raises:
        InputError: the file is not UTF-8, the header has an empty or repeated name, or a row has another number of
            fields than the header.
    """
    lines = _Lines(file, name)
    first_line = next((line for line in lines if line.strip()), "")
    if delimiter is None:
        delimiter = max(_DELIMITERS, key=lambda mark: _num_fields(first_line, mark))
    rows = _read_values(itertools.chain([first_line], lines), lines, name, delimiter)
    header = [field.strip() for field in next(rows, (["-"], ""))[0]]
    if "" in header or len(set(header)) < len(header):
        raise InputError(
            f"{name} has an empty or repeated name in its header ({', '.join(map(repr, header))}); its first line must "
            "name each field once."
        )
    for values, where in rows:
        if len(values) != len(header):
            raise InputError(
                f"{where} has {len(values)} fields, but the header has {len(header)} ({', '.join(header)}); quote "
                f"fields that contain the delimiter {delimiter!r} or a line break."
            )
        yield Row(dict(zip(header, values, strict=True)), where)


def _num_fields(line: str, delimiter: str) -> int:
    try:
        return len(next(csv.reader([line], delimiter=delimiter)))
    except csv.Error:
        return 0


def _read_values(texts: Iterable[str], lines: "_Lines", name: str, delimiter: str) -> Iterator[tuple[list[str], str]]:
    """Yield the values of each row that is not blank, and its place."""
    csv.field_size_limit(LONGEST_ROW_BYTES)  # the default of 128 KiB is less than a long chat
    reader = csv.reader(texts, delimiter=delimiter, strict=True)
    first = lines.number
    while True:
        where = f"{name}, line {first}"
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(
                f"{where} is not a row of a table: {error}; quotes inside a quoted field must be doubled."
            ) from error
        if values:
            yield values, where
        first = lines.number + 1


class _Lines:
    """The lines of a UTF-8 file as text, and the number of the last one."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._lines, self._name, self.number = read_lines(file, name), name, 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.number += 1
        try:
            return line.decode("utf-8-sig" if self.number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{self._name}, line {self.number} is not UTF-8 text; save the file as UTF-8.") from error
