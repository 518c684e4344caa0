"""Progress of a run: the interface of listeners, and reports from `metrics.jsonl` during training."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rayk.report.run_directory import MetricsFollower
from rayk.storage.lease import Lease


class ProgressListener:
    """Base class of listeners to a run's progress. Its methods do nothing; override those whose events you need."""

    def stage(self, text: str) -> None:
        """Called when a new stage of the run begins."""

    def steps(self, rows: Sequence[Mapping[str, Any]], total: int) -> None:
        """Called with new rows of `metrics.jsonl`. Steps may occur again after a worker's death or on resuming."""

    def progress(self, done: int, total: int, text: str, unit: str = "row") -> None:
        """Called when `done` of `total` units of the current stage are finished."""


class LeaseHolder(ProgressListener):
    """Reports to another listener, and stops the run where another process has taken its lease: at the next stage, or
    the next unit of one. Training workers notice that themselves."""

    def __init__(self, listener: ProgressListener, lease: Lease):
        self._listener, self._lease = listener, lease

    def stage(self, text: str) -> None:
        self._lease.check()
        self._listener.stage(text)

    def steps(self, rows: Sequence[Mapping[str, Any]], total: int) -> None:
        self._listener.steps(rows, total)

    def progress(self, done: int, total: int, text: str, unit: str = "row") -> None:
        self._lease.check()
        self._listener.progress(done, total, text, unit)


@contextmanager
def follow_metrics(folder: Path, total: int, listener: ProgressListener) -> Iterator[None]:
    """Report new rows of `folder`/metrics.jsonl to the listener while the block runs.

    The rows are read from the file, because rank 0, which writes it, may run on another node.
    """
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
