"""Training of students on Ray Train: the loop, its checkpoints, and the worker group that runs it.

The optimizer and the settings of a step need no Ray, so the package loads Ray only for what does.
"""

from typing import TYPE_CHECKING, Any

from rayk.training.optimizer import count_steps

if TYPE_CHECKING:
    from rayk.training.job import Job, Outcome
    from rayk.training.trainer import evaluate_remotely, train

__all__ = ["Job", "Outcome", "count_steps", "evaluate_remotely", "train"]
_MODULES = {"Job": "job", "Outcome": "job", "evaluate_remotely": "trainer", "train": "trainer"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
