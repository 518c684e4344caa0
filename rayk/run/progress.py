"""What a run tells whoever watches."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rayk.report.run_directory import Follower


class ProgressListener:
    """What a run tells whoever watches; the command line draws it."""

    def stage(self, text: str) -> None:
        """A new part of the run begins."""

    def steps(self, rows: Sequence[Mapping[str, Any]], total: int) -> None:
        """Rows of `metrics.jsonl` since the last call; after a worker's death they begin again at the first."""

    def progress(self, done: int, total: int, text: str, unit: str = "row") -> None:
        """So much of the current part is done."""


@contextmanager
def watching(folder: Path, total: int, listener: ProgressListener) -> Iterator[None]:
    """Tell the watcher of new rows in `metrics.jsonl` while training runs, wherever rank 0 is."""
    done = threading.Event()
    follower = Follower(folder / "metrics.jsonl")

    def tell() -> None:
        finished = False
        while not finished:
            finished = done.wait(0.5)
            if rows := follower.rows():
                listener.steps(rows, total)

    thread = threading.Thread(target=tell, name="rayk-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
