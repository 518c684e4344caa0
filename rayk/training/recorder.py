"""Record metrics in `metrics.jsonl`, in trackers and for Prometheus, on rank 0."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rayk.config import TrackingConfig
from rayk.errors import Overtaken, RaykError
from rayk.report.run_directory import read_lines
from rayk.serving.metrics import RunMetrics
from rayk.storage.atomic import disk_errors, write_whole
from rayk.training.trackers import Trackers


class Recorder:
    """Append one row per step. When opened at step n, remove the rows of later steps, so that after a resume every step
    has exactly one row.

    Opening replaces the file. A recorder of an earlier attempt that is still alive notices this, and records nothing
    any more. Problems of `record` are kept until `check`, because they occur on rank 0 alone.
    """

    def __init__(self, folder: Path, step: int, tracking: TrackingConfig, exported: RunMetrics | None = None):
        """
        Args:
            exported: the run's metrics for Prometheus.
        """
        self._exported = exported
        self._path = folder / "metrics.jsonl"
        self._problem: RaykError | None = None
        self._rewrite([line for line in read_lines(self._path) if line["step"] <= step])
        self._trackers = Trackers(folder, step, tracking)

    def record(self, row: dict[str, Any]) -> None:
        if self._problem is not None:
            return  # a row after a missing one would hide the gap
        with self.noting_problems():
            self._check_file()
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            self._trackers.log(row, row["step"])
        if self._exported is not None:
            self._exported.record(row)

    def add_to_last(self, values: dict[str, Any]) -> None:
        """Add values to the last row."""
        with self.noting_problems():
            self._check_file()
            *earlier, last = read_lines(self._path)
            self._file.close()
            self._rewrite([*earlier, last | values])
            self._trackers.log(values, last["step"])

    def check(self) -> None:
        """Check that all rows could be recorded.

        Raises:
            RunFailed: the disk is full, or another process has replaced the file.
            InputError: the file cannot be written.
        """
        if self._problem is not None:
            raise self._problem

    def sync(self) -> None:
        """Write all rows to the disk, before a checkpoint of the last one. Raises the errors of `check`."""
        self.check()
        with disk_errors(self._path.parent):
            os.fsync(self._file.fileno())

    @contextlib.contextmanager
    def noting_problems(self) -> Iterator[None]:
        """Keep the first problem of a block that writes to the run directory until `check`."""
        try:
            with disk_errors(self._path.parent):
                yield
        except RaykError as error:
            self._problem = self._problem or error

    def _check_file(self) -> None:
        """Check that this recorder's file is still the run's.

        Raises:
            Overtaken: another process has replaced it.
        """
        try:
            is_current = os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            is_current = False
        if not is_current:
            raise Overtaken(
                f"'{self._path}' was replaced or deleted, because another process has continued this run or removed "
                "its files, so this one stops."
            )

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        write_whole(self._path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        self._file = self._path.open("a", encoding="utf-8")

    def close(self, completed: bool = False) -> None:
        """Close the files.

        Args:
            completed: whether the run has reached its end, as trackers show it.
        """
        with contextlib.suppress(OSError):  # of a row that a full disk has refused
            self._file.close()
        self._trackers.close(completed)
