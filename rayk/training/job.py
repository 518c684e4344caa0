"""What the driver and the workers of a run exchange."""

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


def _import_paths() -> list[str]:
    """Return the folders in which this process finds modules: the current folder, PYTHONPATH, the config file's folder;
    without those of the Python installation."""
    folders = [str(Path(entry).absolute()) for entry in ("", *sys.path)]
    return [folder for folder in dict.fromkeys(folders) if not folder.startswith((sys.prefix, sys.base_prefix))]


@dataclass(frozen=True)
class Job:
    """What the driver sends to every worker. Tables travel through Ray's object store, teachers by name."""

    config: RunConfig
    tokenizer: str
    applications: Mapping[str, str]
    """The Serve application of each teacher."""
    train_table: Any
    evaluation_table: Any
    auxiliary_table: Any = None
    """The rows of the method's `auxiliary_data`."""
    policy: PolicyAddress | None = None
    """The application of the served policy; None: each worker generates."""
    views: Any = None
    """A `RowViews`: the contexts of rows, by the model that reads them; None: no row has any."""
    base: str = ""
    """The fingerprint of the frozen weights below an adapter."""
    import_paths: list[str] = field(default_factory=_import_paths)
    """Folders in which workers find the user's modules, as the driver does."""

    def connect_teachers(self, cache: SignalCache | None = None) -> dict[str, Teacher]:
        """Connect to each training teacher; by its name in the settings."""
        return {t.name: connect_teacher(self.applications[t.name], t, cache) for t in self.config.training_teachers}

    def extend_import_paths(self) -> None:
        """Let this process import the user's modules."""
        sys.path += [folder for folder in self.import_paths if folder not in sys.path]


@dataclass(frozen=True)
class Outcome:
    """What a worker group returns: its last step, and the last evaluation or the reason why it stopped."""

    step: int
    total_steps: int
    evaluation: Evaluation | None = None
    problem: RaykError | None = None
    size: ParameterCount | None = None
    """The number of the student's parameters."""


def fetch(shared: Any) -> Any:
    """Return a table of a job, from Ray's object store if it is there."""
    return ray.get(shared) if isinstance(shared, ray.ObjectRef) else shared
