"""Show a run's progress: as a bar on a terminal, otherwise as lines."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from rayk.commands.console import console as standard_error
from rayk.run import ProgressListener

_LINE_EVERY_SECONDS = 10.0


class TerminalProgress(ProgressListener):
    """A progress listener that prints stages as lines with the time since the start, and steps as a bar.

    If the output is no terminal, it prints steps as lines, at most one per `_LINE_EVERY_SECONDS`.
    """

    def __init__(self, console: Console = standard_error):
        self._console = console
        self._started = time.monotonic()
        self._bar: Progress | None = None
        self._last_line = 0.0
        self._last_step = 0

    def stage(self, text: str) -> None:
        self._close()
        self._last_step = 0
        self._console.print(Text.assemble((f"{time.monotonic() - self._started:5.0f} s", "dim"), "  ", text))

    def steps(self, rows: Sequence[Mapping[str, Any]], total: int) -> None:
        row = rows[-1]
        if row["step"] <= self._last_step:  # a resumed run repeats the steps after its checkpoint
            return
        self._last_step = row["step"]
        text = f"loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tokens/s"
        if "evaluation_loss" in row:
            text += f"  evaluation loss {row['evaluation_loss']:.4f}"
        self._show("step", row["step"], total, text)

    def progress(self, done: int, total: int, text: str, unit: str = "row") -> None:
        self._show(unit, done, total, text)

    def _show(self, unit: str, done: int, total: int, text: str) -> None:
        if self._console.is_terminal:
            self._draw(done, total, text)
        elif time.monotonic() - self._last_line > _LINE_EVERY_SECONDS or done == total:
            self._last_line = time.monotonic()
            self._console.print(f"         {unit} {done}/{total}  {text}")
        if done >= total:
            self._close()

    def _draw(self, done: int, total: int, text: str) -> None:
        if self._bar is None:
            columns = (TextColumn("        "), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console)
            self._bar.add_task("", total=total)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done, description=text)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
