"""Progress of a run: the listener interface, and following `metrics.jsonl` while training runs."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rayk.report.run_directory import MetricsFollower


class ProgressListener:
    """Receives a run's progress and ignores it; override what you want to show. The command line draws it."""

    def stage(self, text: str) -> None:
        """A new stage of the run begins."""

    def steps(self, rows: Sequence[Mapping[str, Any]], total: int) -> None:
        """New rows of `metrics.jsonl`. After a worker's death and on resuming, earlier steps may be repeated."""

    def progress(self, done: int, total: int, text: str, unit: str = "row") -> None:
        """`done` of `total` units of the current stage are finished."""


@contextmanager
def follow_metrics(folder: Path, total: int, listener: ProgressListener) -> Iterator[None]:
    """Report new rows of `folder`/metrics.jsonl to the listener while the block runs, wherever rank 0 is."""
    done = threading.Event()
    follower = MetricsFollower(folder / "metrics.jsonl")

    def report() -> None:
        finished = False
        while not finished:
            finished = done.wait(0.5)
            if rows := follower.new_rows():
                listener.steps(rows, total)

    thread = threading.Thread(target=report, name="rayk-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
