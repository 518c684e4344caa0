"""Print messages to standard error and results to standard output. Imports neither torch nor ray."""

import re
import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

# Users' texts are shown as they are: no markup is interpreted, and only the terminal wraps lines.
console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
"""Messages and progress go to standard error; results go to standard output."""

_MARKS = {"ok": ("✓", "green"), "note": ("•", "yellow"), "wrong": ("✗", "red")}


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(text: str) -> str:
    """Return a text with escapes for control characters but tabs and line breaks: a terminal would obey those that a
    row, a file's name or a model's answer contains."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def print_table(table: Table) -> None:
    """Print a table to standard output; its rows are wrapped only on a terminal."""
    Console(width=None if sys.stdout.isatty() else 1000, highlight=False).print(table)


def print_sections(sections: Sequence[Mapping[str, str]]) -> None:
    """Print each section as a table of names and texts, with an empty line between sections; skip empty texts."""
    for number, section in enumerate(sections):
        if number:
            print()
        print_table(two_columns(section))


def two_columns(texts: Mapping[str, str]) -> Table:
    """Return a table with a name and a text per row, without the empty texts."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, text in texts.items():
        if text:
            table.add_row(Text(printable(name)), Text(printable(text)))
    return table


def print_check(state: str, text: str) -> None:
    """Print one finding of `rayk doctor` to standard output; `state` is "ok", "note" or "wrong"."""
    Console(highlight=False, markup=False, soft_wrap=True).print(Text.assemble(_MARKS[state], " ", printable(text)))
