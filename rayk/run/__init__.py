"""A run from settings to result: read and check the inputs, deploy teachers, synthesize rows, train and measure."""

import warnings
from typing import Any

from rayk.config.loading import with_absolute_paths
from rayk.run.applications import (
    connect_attached_teachers,
    policy_application,
    required_cpus,
    serve_teachers,
    teacher_applications,
)
from rayk.run.evaluation import evaluate_model
from rayk.run.export import Export, export_model
from rayk.run.pipeline import Result
from rayk.run.progress import ProgressListener
from rayk.run.rounds import distill, next_round, synthesize

__all__ = [
    "Export",
    "ProgressListener",
    "Result",
    "connect_attached_teachers",
    "distill",
    "evaluate_model",
    "export_model",
    "next_round",
    "policy_application",
    "required_cpus",
    "serve_teachers",
    "synthesize",
    "teacher_applications",
    "with_absolute_paths",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "Watcher":
        message = "rayk.run.Watcher is now rayk.run.ProgressListener; the old name will be removed in the next release."
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return ProgressListener
    raise AttributeError(f"module 'rayk.run' has no attribute '{name}'")
