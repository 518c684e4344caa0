"""Write and read the metrics of the student before its first update, a file in the run directory."""

import json
from collections.abc import Mapping
from pathlib import Path

from rayk.storage.atomic import write_whole


def record_initial_metrics(output: Path, metrics: Mapping[str, float]) -> None:
    """Write the metrics of the untrained student.

    Raises:
        RunFailed: the disk is full.
        InputError: the folder cannot be written.
    """
    write_whole(_path(output), json.dumps(metrics).encode())


def read_initial_metrics(output: Path) -> dict[str, float] | None:
    """Return the metrics of the untrained student; None if they were not measured."""
    path = _path(output)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _path(output: Path) -> Path:
    return output / "student_before.json"
