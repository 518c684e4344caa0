"""Data that the driver and the workers of a run exchange: `Job` and `Outcome`."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from rayk.config import RunConfig
from rayk.errors import RaykError
from rayk.evaluation.evaluate import Evaluation
from rayk.models.student import ParameterCount
from rayk.rollouts import PolicyAddress
from rayk.teachers import Teacher, connect_teacher
from rayk.teachers.cache import SignalCache
from rayk.teachers.following import connect_following_teacher


def _import_paths() -> list[str]:
    """Return the folders in which this process finds modules: the current folder, PYTHONPATH, the config file's folder;
    without those of the Python installation."""
    folders = [str(Path(entry).absolute()) for entry in ("", *sys.path)]
    return [folder for folder in dict.fromkeys(folders) if not folder.startswith((sys.prefix, sys.base_prefix))]


@dataclass(frozen=True)
class Job:
    """Description of a run that the driver sends to every worker. Tables are sent through Ray's object store, and
    teachers by the names of their Serve applications."""

    config: RunConfig
    tokenizer: str
    applications: Mapping[str, str]
    """The Serve application of each teacher."""
    train_table: Any
    evaluation_table: Any
    auxiliary_table: Any = None
    """The rows of the method's `auxiliary_data`."""
    policy: PolicyAddress | None = None
    """The application of the served policy; None if workers generate themselves."""
    views: Any = None
    """A `RowViews`, which adds contexts to rows; None if all models read rows in the same context."""
    base: str = ""
    """The fingerprint of the frozen weights below an adapter."""
    generated_ids: int | None = None
    """Number of leading token ids that rollouts may contain; None for all of the student's tokens."""
    trained_ends: tuple[int, ...] = ()
    """Ids of the tokens that end the completions that are trained on."""
    chat_template: str | None = None
    """The template saved with the student's tokenizer; None: the tokenizer's own."""
    import_paths: list[str] = field(default_factory=_import_paths)
    """Folders in which the driver, and so the workers, find the user's modules."""

    def connect_teachers(self, cache: SignalCache | None = None) -> dict[str, Teacher]:
        """Connect to the training teachers; return them by their names in the settings."""
        return {
            teacher.name: connect_following_teacher(self.applications[teacher.name], teacher)
            if teacher.follows
            else connect_teacher(self.applications[teacher.name], teacher, cache)
            for teacher in self.config.training_teachers
        }

    def extend_import_paths(self) -> None:
        """Let this process import the user's modules."""
        sys.path += [folder for folder in self.import_paths if folder not in sys.path]


@dataclass(frozen=True)
class Outcome:
    """Result of a worker group: its last step, and the last evaluation or the problem that stopped it."""

    step: int
    total_steps: int
    evaluation: Evaluation | None = None
    problem: RaykError | None = None
    size: ParameterCount | None = None
    """The number of the student's parameters."""
    best: dict[str, Any] | None = None
    """The best evaluation, whose weights were saved (`BestEvaluation.summary`); None without
    `evaluation.keep_best`."""


def fetch(shared: Any) -> Any:
    """Return the value of a job's field, from Ray's object store if the field is an `ObjectRef`."""
    return ray.get(shared) if isinstance(shared, ray.ObjectRef) else shared
