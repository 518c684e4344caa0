"""A run directory as it stands on disk: `config.yaml`, `metrics.jsonl`, `summary.json`, finished or not."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rayk.errors import InputError

COLOURS = ("#2f6db5", "#d9730d", "#2c8a63", "#b23a6f", "#7358b5", "#8a6a3b", "#1e98b0", "#6b7280")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a metrics file; a last one cut off by a kill is left out."""
    if not path.exists():
        return []
    return _whole_rows(path.read_bytes())


class Follower:
    """New rows of a metrics file that grows. Where a restart has cut it back it is told again from the start."""

    def __init__(self, path: Path):
        self._path = path
        self._inode, self._read = -1, 0

    def rows(self) -> list[dict[str, Any]]:
        """The rows since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self._inode:
                self._inode, self._read = inode, 0
            file.seek(self._read)
            data = file.read()
        self._read += data.rfind(b"\n") + 1
        return _whole_rows(data)


def _whole_rows(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


@dataclass(frozen=True)
class Run:
    """One run directory as it stands, with its look in every figure."""

    path: Path
    label: str
    place: int
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    summary: dict[str, Any] | None
    synthesis: dict[str, Any] | None = None
    """What the writing of its training rows came to."""
    retriever: dict[str, Any] | None = None
    """What the training of its retriever came to."""

    @property
    def colour(self) -> str:
        return COLOURS[self.place % len(COLOURS)]

    @property
    def dash(self) -> str:
        """Beyond the palette, colours come again as dashed lines."""
        return "-" if self.place < len(COLOURS) else "--"

    @property
    def method(self) -> str:
        return str(self.config["method"]["kind"])

    @property
    def steps(self) -> int:
        return self.rows[-1]["step"] if self.rows else 0

    @cached_property
    def metrics(self) -> Mapping[str, float]:
        """The student's evaluation: the final one, or the latest of an unfinished run."""
        if self.summary is not None:
            return self.summary["student"]
        for row in reversed(self.rows):
            found = {name.removeprefix("evaluation_"): row[name] for name in row if name.startswith("evaluation_")}
            if found:
                return {**found, "step": row["step"]}
        return {}

    @property
    def tokens(self) -> int:
        return sum(row["tokens"] for row in self.rows)

    @property
    def training_seconds(self) -> float:
        return sum(row["step_seconds"] for row in self.rows)

    @property
    def teacher_name(self) -> str | None:
        for teacher in self.config.get("teachers") or []:
            return last_part(teacher.get("model") or teacher.get("name"))
        return None

    @property
    def trained(self) -> str | None:
        """What share of the student's parameters was trained, where not all were."""
        size = (self.summary or {}).get("parameters")
        if size is None or size["trained"] == size["total"]:
            return None
        return f"{size['trained']:,} of {size['total']:,} parameters trained ({size['trained'] / size['total']:.2%})"

    @property
    def status(self) -> str | None:
        """What is missing of an unfinished run."""
        if self.summary is not None:
            return None
        total = (self.config.get("training") or {}).get("steps")
        text = f"unfinished: step {self.steps:,}" + (f" of {total:,}" if total else "")
        return text + (f", measured at step {self.metrics['step']:,}" if self.metrics else ", not measured yet")

    def series(self, name: str) -> "Series | None":
        """Column `name` over the steps that have it."""
        points = [(row["step"], row[name]) for row in self.rows if isinstance(row.get(name), int | float)]
        points = [(step, value) for step, value in points if math.isfinite(value)]
        return Series(self, *np.array(points, dtype=float).T) if points else None


@dataclass(frozen=True, eq=False)
class Series:
    """One run's curve: float [points] each."""

    run: Run
    steps: np.ndarray
    values: np.ndarray


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in `paths`, with labels that tell them apart. One of several rounds counts as so many.

    Raises:
        InputError: a folder is no run directory.
    """
    paths = [each for path in paths for each in _rounds_of(path) or [path]]
    configs = [_read_config(path) for path in paths]
    names = [str(config["name"]) for config in configs]
    runs = []
    for place, (path, config, name) in enumerate(zip(paths, configs, names, strict=True)):
        folder = path.absolute().name
        unique = [other.absolute().name for other in paths].count(folder) == 1
        label = name if names.count(name) == 1 else f"{name} ({folder if unique else path})"
        rows, written = read_lines(path / "metrics.jsonl"), _read_summary(path / "synthesis")
        retriever = _read_summary(path / "retriever")
        runs.append(Run(path, label, place, config, rows, _read_summary(path), written, retriever))
    return runs


def _rounds_of(path: Path) -> list[Path]:
    """The run directories of a run's rounds that have begun; none where it has no rounds."""
    return sorted(file.parent for file in path.glob("rounds/*/config.yaml"))


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.yaml"
    if not file.is_file():
        why = "has no config.yaml" if path.is_dir() else "does not exist"
        raise InputError(f"'{path}' is no run directory of rayk: it {why}; give the output folder of a run.")
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"'{file}' cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(config, dict) or "name" not in config or "kind" not in (config.get("method") or {}):
        raise InputError(f"'{file}' is no config of a run; give the output folder of a run.")
    return config


def _read_summary(path: Path) -> dict[str, Any] | None:
    file = path / "summary.json"
    if not file.exists():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"'{file}' cannot be read: {error}; remove it to report it as unfinished.") from error


def last_part(model: Any) -> str:
    return str(model).rstrip("/").rsplit("/", 1)[-1]


def flattened(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"a.b": value, "teachers.0.model": value}."""
    if isinstance(values, dict) and values:
        items: Iterable[tuple[Any, Any]] = values.items()
    elif isinstance(values, list) and values and isinstance(values[0], dict):
        items = enumerate(values)
    else:
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= flattened(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def teachers_of(runs: list[Run]) -> list[tuple[Run, Mapping[str, float]]]:
    """Each measured teacher once, with the run that measured it."""
    found: dict[str | None, tuple[Run, Mapping[str, float]]] = {}
    for run in runs:
        if run.summary and run.summary["teacher"]:
            found.setdefault(run.teacher_name, (run, run.summary["teacher"]))
    return list(found.values())


def duration(seconds: float) -> str:
    """In words, for readers."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"
