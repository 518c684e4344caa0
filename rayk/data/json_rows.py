"""Read rows from JSON files: lines, a list, an object with a list of rows, or one row; one value at a time."""

import codecs
import json
from collections.abc import Callable, Collection, Iterator
from typing import Any, BinaryIO

from rayk.data.json_text import STRICT, parse_json
from rayk.data.rows import LONGEST_ROW_BYTES, Row, read_lines, too_long
from rayk.errors import InputError

_CHUNK_BYTES = 1 << 20
_LONGEST_LINE = 1 << 20
_LONGEST_TOKEN = 16
"""Characters at the end of a text in which a word, number or escape may be cut off."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_json(open_file: Callable[[], BinaryIO], name: str, split: str, row_fields: Collection[str]) -> Iterator[Row]:
    """Yield the rows of a JSON file.

    Args:
        open_file: opens the file; it is opened twice, to find out its form and to read it.
        name: name of the file in messages.
        split: the list to read from an object that has several lists of objects.
        row_fields: fields of rows; an object that has one is a row, also if it contains a list of objects.

    Raises:
        InputError: the file is not JSON, or has several lists and none is called `split`.
    """
    first_line = _first_line(open_file)
    if first_line.startswith(b"["):
        with open_file() as file:
            yield from _read_list(_JsonStream(file, name))
        return
    lists = _find_lists(open_file, name, first_line, row_fields) if first_line.startswith(b"{") else None
    with open_file() as file:
        if lists is None:
            yield from _read_lines(file, name)
            return
        stream = _JsonStream(file, name)
        if not lists:
            yield _row(stream.value(), f"row 1 of {name}")
            return
        chosen = split if split in lists else lists[0]
        if len(lists) > 1 and chosen != split:
            raise InputError(
                f"{name} has several lists of rows ({', '.join(lists)}); set the source's split to one of them."
            )
        for key in stream.object_keys():
            if key == chosen:
                yield from _read_list(stream)
                return
            stream.value()


def _first_line(open_file: Callable[[], BinaryIO]) -> bytes:
    """Return the first line that is not blank, or its beginning, without white space around it."""
    with open_file() as file:
        line = file.readline(_LONGEST_LINE).removeprefix(_BYTE_ORDER_MARK)
        while line and not line.strip():
            line = file.readline(_LONGEST_LINE)
    return line.strip()


def _find_lists(
    open_file: Callable[[], BinaryIO], name: str, first_line: bytes, row_fields: Collection[str]
) -> list[str] | None:
    """Return the keys of the lists of objects in the only object of a file; none if the object is a row of several
    lines, and None if the file has a row a line."""
    lists: list[str] = []
    empty_lists: list[str] = []
    is_row = False
    try:
        with open_file() as file:
            stream = _JsonStream(file, name)
            for key in stream.object_keys():
                is_row |= key in row_fields
                if stream.peek() != "[":
                    stream.value()
                elif not (kinds := {type(element) for element in stream.list_elements()}):
                    empty_lists.append(key)
                elif kinds == {dict}:
                    lists.append(key)
            if stream.peek():
                return None
    except InputError:
        if first_line.endswith(b"}"):  # a broken line is named by the reader of lines
            return None
        raise
    if not is_row and (lists or empty_lists):
        return lists or empty_lists
    return None if first_line.endswith(b"}") else []


def _read_list(stream: "_JsonStream") -> Iterator[Row]:
    for number, fields in enumerate(stream.list_elements(), start=1):
        yield _row(fields, f"row {number} of {stream.name}")


def _read_lines(file: BinaryIO, name: str) -> Iterator[Row]:
    # Read as bytes: text mode also splits lines at a single carriage return.
    for number, line in enumerate(read_lines(file, name), start=1):
        where = f"{name}, line {number}"
        if number == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if line.strip():
            yield _row(parse_json(line.rstrip(), where), where)


def _row(fields: Any, where: str) -> Row:
    if not isinstance(fields, dict):
        raise InputError(f'{where} is a {type(fields).__name__}, not an object with fields such as {{"prompt": …}}.')
    return Row(fields, where)


class _JsonStream:
    """Decode the values of a JSON document one by one; only the current one is in memory."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self.name = file, name
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._position, self._ended = "", 0, False
        self._lines, self._column, self._rows = 0, 0, 0
        self._undecodable: UnicodeDecodeError | None = None
        self._read()

    def peek(self) -> str:
        """Return the next character that is not white space; "" at the end."""
        while True:
            while self._position < len(self._text) and self._text[self._position] in " \t\r\n":
                self._position += 1
            if self._position < len(self._text) or self._ended:
                return self._text[self._position : self._position + 1]
            self._read()

    def value(self) -> Any:
        """Return the next value."""
        self.peek()
        while True:
            try:
                value, end = STRICT.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos > len(self._text) - _LONGEST_TOKEN
                if self._ended or not is_cut:
                    raise self._error(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:
                raise self._error(str(error), self._position) from error
            else:
                if end < len(self._text) or self._ended:
                    self._position = end
                    return value
            self._read()

    def list_elements(self) -> Iterator[Any]:
        """Yield the elements of the list that comes next."""
        self._rows = 0
        for _ in self._items("[", "]"):
            self._rows += 1
            yield self.value()
        self._rows = 0

    def object_keys(self) -> Iterator[str]:
        """Yield the keys of the object that comes next; after each, its value is to be read."""
        for _ in self._items("{", "}"):
            key = self.value()
            self._expect(":")
            yield key

    def _items(self, start: str, end: str) -> Iterator[None]:
        self._expect(start)
        if self.peek() == end:
            self._position += 1
            return
        while True:
            yield
            if self.peek() == end:
                self._position += 1
                return
            self._expect(",")

    def _expect(self, character: str) -> None:
        if self.peek() != character:
            raise self._error(f"Expecting '{character}'", self._position)
        self._position += 1

    def _read(self) -> None:
        """Forget the text before the position, and read at least as much as remains."""
        done, rest = self._text[: self._position], self._text[self._position :]
        if len(rest) > LONGEST_ROW_BYTES:
            raise too_long(self._where())
        self._lines += done.count("\n")
        self._column = len(done) - done.rfind("\n") - 1 if "\n" in done else self._column + len(done)
        if self._undecodable is not None:
            raise InputError(f"{self._where()} is not UTF-8 text; save the file as UTF-8.") from self._undecodable
        data = self._file.read(max(_CHUNK_BYTES, len(rest)))
        self._ended = not data
        try:
            text = self._decoder.decode(data, final=self._ended)
        except UnicodeDecodeError as error:  # raised when the text before has been read, so that its row is named
            text, self._undecodable, self._ended = error.object[: error.start].decode(), error, False
        self._text, self._position = rest + text, 0

    def _where(self) -> str:
        return f"row {self._rows} of {self.name}" if self._rows else self.name

    def _error(self, problem: str, position: int) -> InputError:
        before = self._text[:position]
        line = 1 + self._lines + before.count("\n")
        column = len(before) - before.rfind("\n") if "\n" in before else self._column + len(before) + 1
        return InputError(f"{self._where()} is not JSON: {problem} (line {line}, column {column}).")
