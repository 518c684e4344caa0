"""Read a run directory, finished or not: `config.yaml`, `metrics.jsonl`, `summary.json`, `rollouts.jsonl`."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError

from rayk.config.paths import RUN_CONFIG
from rayk.config.secrets import redact
from rayk.config.yaml_text import parse_yaml
from rayk.errors import InputError

COLORS = ("#2f6db5", "#d9730d", "#2c8a63", "#b23a6f", "#7358b5", "#8a6a3b", "#1e98b0", "#6b7280")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the complete rows of a JSON lines file; a last row that a kill has truncated is left out.

    Raises:
        InputError: a line is damaged, or has no step.
    """
    if not path.exists():
        return []
    return _complete_rows(path.read_bytes(), path)


class MetricsFollower:
    """Reads the new rows of a growing metrics file; begins at the first row again if a restart replaces the file."""

    def __init__(self, path: Path):
        self._path = path
        self._inode, self._offset = -1, 0

    def new_rows(self) -> list[dict[str, Any]]:
        """Return the rows since the last call; errors as `read_lines`."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self._inode:
                self._inode, self._offset = inode, 0
            file.seek(self._offset)
            data = file.read()
        self._offset += data.rfind(b"\n") + 1
        return _complete_rows(data, self._path)


def _complete_rows(data: bytes, path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for line in data[: data.rfind(b"\n") + 1].split(b"\n")[:-1]:
        try:
            row = json.loads(line)
            if type(row["step"]) is not int:
                raise TypeError("its step is no whole number")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InputError(
                f"'{path}' has a damaged line after {len(rows)} whole ones ({error!r}); remove it, or continue the run "
                "from a checkpoint before it."
            ) from error
        rows.append(row)
    return rows


def wait_seconds(rows: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    """Return the seconds that training waited for teachers, and for rollouts, over rows of `metrics.jsonl`.

    A step's `teacher_wait_seconds` is all the time that the step waited for its batch. While the step's rollouts were
    still being generated, this counts as waiting for rollouts, and so does `policy_wait_seconds`.
    """
    teacher = rollouts = 0.0
    for row in rows:
        waited, generating = row["teacher_wait_seconds"], 0.0
        if "generate_started_at" in row:
            started_at = row["ended_at"] - row["step_seconds"]
            generated_at = row["generate_started_at"] + row["generate_seconds"]
            generating = min(started_at + waited, generated_at) - max(started_at, row["generate_started_at"])
            generating = max(0.0, generating)
        teacher += waited - generating
        rollouts += generating + row.get("policy_wait_seconds", 0.0)
    return teacher, rollouts


@dataclass(frozen=True)
class Run:
    """The contents of one run directory, and the run's color and line style in all figures."""

    path: Path
    label: str
    index: int
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    summary: dict[str, Any] | None
    synthesis: dict[str, Any] | None = None
    """The summary of the synthesis of its training rows."""
    retriever: dict[str, Any] | None = None
    """The summary of the training of its retriever."""
    metrics_before: Mapping[str, float] = field(default_factory=dict)
    """The student's evaluation before training; empty if it was not measured."""
    rollouts: list[dict[str, Any]] = field(default_factory=list)
    """Sampled rollouts: `step`, `where`, `prompt`, `completion`, `tokens`, `finish_reason`."""

    @property
    def color(self) -> str:
        return COLORS[self.index % len(COLORS)]

    @property
    def dash(self) -> str:
        """The line style: dashed beyond the palette, where colors repeat."""
        return "-" if self.index < len(COLORS) else "--"

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
    def trained_parameters(self) -> str | None:
        """The share of the student's parameters that was trained; None if all were trained."""
        size = (self.summary or {}).get("parameters")
        if size is None or size["trained"] == size["total"]:
            return None
        return f"{size['trained']:,} of {size['total']:,} parameters trained ({size['trained'] / size['total']:.2%})"

    @property
    def best_step(self) -> int | None:
        """The step of the best evaluation, whose model was saved; None without `evaluation.keep_best`."""
        best = (self.summary or {}).get("best")
        return best["step"] if best else None

    @property
    def chosen_model(self) -> str | None:
        """Which step's model was saved, and why; None if it is that of the last step by default."""
        best = (self.summary or {}).get("best")
        if not best:
            return None
        text = f"model of step {best['step']:,}, the best by {best['metric']} ({best['value']:.4g})"
        return text + (", stopped early" if best["stopped_early"] else "")

    @property
    def status(self) -> str | None:
        """The progress of an unfinished run; None if it is finished."""
        if self.summary is not None:
            return None
        total = (self.config.get("training") or {}).get("steps")
        text = f"unfinished: step {self.steps:,}" + (f" of {total:,}" if total else "")
        return text + (f", measured at step {self.metrics['step']:,}" if self.metrics else ", not measured yet")

    @property
    def routed_teachers(self) -> list[str]:
        """The names of the teachers with metrics of their own (`teacher/NAME/…`)."""
        last = self.rows[-1] if self.rows else {}
        return list(dict.fromkeys(key.split("/")[1] for key in last if key.startswith("teacher/")))

    def series(self, name: str, part: str = "", place: int = 0) -> "Series | None":
        """Return the column `name` over the steps that have it; None if no step has."""
        points = [(row["step"], row[name]) for row in self.rows if isinstance(row.get(name), int | float)]
        points = [(step, value) for step, value in points if math.isfinite(value)]
        if not points:
            return None
        steps, values = np.array(points, dtype=float).T
        return Series(self, steps, values, part, place)


@dataclass(frozen=True, eq=False)
class Series:
    """One run's curve: two float arrays [points]."""

    run: Run
    steps: np.ndarray
    values: np.ndarray
    part: str = ""
    """The part of the run that the curve shows, such as a teacher, where a figure has several curves of a run."""
    place: int = 0
    """The curve's number among those of its run."""


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read the runs in `paths`, with distinct labels. A run with rounds counts as one run per round.

    Raises:
        InputError: a folder is no run directory.
    """
    paths = [folder for path in paths for folder in _round_folders(path) or [path]]
    configs = [_read_config(path) for path in paths]
    names = [str(config["name"]) for config in configs]
    runs = []
    for index, (path, config, name) in enumerate(zip(paths, configs, names, strict=True)):
        folder = path.absolute().name
        unique = [other.absolute().name for other in paths].count(folder) == 1
        label = name if names.count(name) == 1 else f"{name} ({folder if unique else path})"
        runs.append(
            Run(
                path, label, index, config, read_lines(path / "metrics.jsonl"), _read_summary(path),
                synthesis=_read_summary(path / "synthesis"), retriever=_read_summary(path / "retriever"),
                metrics_before=_read_json(path / "student_before.json") or {},
                rollouts=read_lines(path / "rollouts.jsonl"),
            )
        )  # fmt: skip
    return runs


def _round_folders(path: Path) -> list[Path]:
    """Return the run directories of the rounds that have started; none where the run has no rounds."""
    return sorted(file.parent for file in path.glob("rounds/*/config.yaml"))


def _read_config(path: Path) -> dict[str, Any]:
    file = path / RUN_CONFIG
    if not file.is_file():
        reason = "has no config.yaml" if path.is_dir() else "does not exist"
        raise InputError(f"'{path}' is no run directory of rayk: it {reason}; give the output folder of a run.")
    try:
        config = parse_yaml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"'{file}' cannot be read: {error}.") from error
    method = config.get("method") if isinstance(config, dict) else None
    if not isinstance(method, dict) or "name" not in config or "kind" not in method:
        raise InputError(f"'{file}' is no config of a run; give the output folder of a run.")
    return redact(config)  # one of an earlier version may contain secrets


def _read_summary(path: Path) -> dict[str, Any] | None:
    return _read_json(path / "summary.json")


def _read_json(file: Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it contains a {type(content).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"'{file}' cannot be read: {error}; remove it to report the run as unfinished.") from error
    return content


@contextmanager
def explain_odd_values(runs: Sequence[Path]) -> Iterator[None]:
    """Translate the errors of a block that shows `runs`, whose files may be damaged or another program's.

    Raises:
        InputError: a file has a value that rayk does not write there.
    """
    try:
        yield
    except InputError:
        raise
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
        TemplateError,
    ) as error:
        raise InputError(
            f"A file in {', '.join(f'{str(path)!r}' for path in runs)} has values that rayk does not write there "
            f"({type(error).__name__}: {error}); restore the file, or leave the run out."
        ) from error


def last_part(model: Any) -> str:
    """Return the last part of a model's name or path."""
    return str(model).rstrip("/").rsplit("/", 1)[-1]


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested settings as {"a.b": value, "teachers.0.model": value}."""
    if isinstance(values, dict) and values:
        items: Iterable[tuple[Any, Any]] = values.items()
    elif isinstance(values, list) and values and isinstance(values[0], dict):
        items = enumerate(values)
    else:
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def measured_teachers(runs: Sequence[Run]) -> list[tuple[Run, Mapping[str, float]]]:
    """Return each measured teacher once, with the run that measured it."""
    found: dict[str | None, tuple[Run, Mapping[str, float]]] = {}
    for run in runs:
        if run.summary and run.summary["teacher"]:
            found.setdefault(run.teacher_name, (run, run.summary["teacher"]))
    return list(found.values())


def duration(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"
