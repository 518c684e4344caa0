"""What the driver and the workers of a run tell each other."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray

from rayk.config import RunConfig
from rayk.errors import RaykError
from rayk.evaluation.evaluate import Evaluation
from rayk.models.student import Size
from rayk.rollouts import PolicyAddress
from rayk.teachers import Teacher, connect_teacher
from rayk.teachers.cache import SignalCache


@dataclass(frozen=True)
class Job:
    """What the driver hands to every worker. Tables travel through Ray's object store, teachers by name."""

    config: RunConfig
    tokenizer: str
    applications: Mapping[str, str]
    """The Serve application of each teacher."""
    train_table: Any
    evaluation_table: Any
    pretraining_table: Any = None
    policy: PolicyAddress | None = None
    """Where the policy is served; None: each worker writes by itself."""
    views: Any = None
    """A `RowViews`: the contexts of rows, by the model that reads them; None: no row has any."""
    base: str = ""
    """The fingerprint of the frozen weights below an adapter."""

    def teachers(self, cache: SignalCache | None = None) -> dict[str, Teacher]:
        """Each teacher by its name in the settings, asked once whether it answers."""
        return {t.name: connect_teacher(self.applications[t.name], t, cache) for t in self.config.training_teachers}


@dataclass(frozen=True)
class Outcome:
    """What a worker group returns: how far it came, the last evaluation, or why it had to stop."""

    step: int
    total_steps: int
    evaluation: Evaluation | None = None
    problem: RaykError | None = None
    size: Size | None = None
    """Of the student."""


def fetched(shared: Any) -> Any:
    """A table of a job, wherever it lies."""
    return ray.get(shared) if isinstance(shared, ray.ObjectRef) else shared
