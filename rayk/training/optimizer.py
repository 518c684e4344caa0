"""AdamW, its learning-rate schedule, and the number of steps of a run."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rayk.config import TrainingConfig


def make_optimizer(parameters: Sequence[Tensor], settings: TrainingConfig) -> torch.optim.AdamW:
    """Return AdamW on `parameters`; the loop sets its learning rate at every step."""
    assert settings.learning_rate is not None  # `RunConfig` sets it
    return torch.optim.AdamW(
        _decay_groups(parameters, settings.weight_decay), lr=settings.learning_rate, betas=settings.betas, fused=True
    )


def steps_of_epochs(settings: TrainingConfig, rows: int) -> int:
    """Return the number of optimizer steps in `settings.epochs` passes over `rows` rows, at least one."""
    assert settings.epochs is not None
    return max(1, round(settings.epochs * rows / settings.batch_size))


def learning_rate_at(step: int, total_steps: int, settings: TrainingConfig) -> float:
    """Return the rate of step `step` (from 0): linear warm-up, then the schedule down to `final_learning_rate`."""
    assert settings.learning_rate is not None
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, total_steps - settings.warmup_steps)
    share = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[settings.schedule]
    return settings.learning_rate * (settings.final_learning_rate + (1 - settings.final_learning_rate) * share)


def _decay_groups(parameters: Sequence[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups with weight decay for matrices, and without it for norms and biases."""
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
