"""Training of students on Ray Train: the loop, its checkpoints, and the worker group that runs it."""

from rayk.training.job import Job, Outcome
from rayk.training.optimizer import steps_of_epochs
from rayk.training.trainer import evaluate_remotely, train

__all__ = ["Job", "Outcome", "evaluate_remotely", "steps_of_epochs", "train"]
