"""Students on Ray Train: the loop, its checkpoints, and the worker group it runs in."""

from rayk.training.trainer import evaluate_remotely, train

__all__ = ["evaluate_remotely", "train"]
