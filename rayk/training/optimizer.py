"""The optimizer, its learning-rate schedule, and the number of steps of a run."""

import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rayk.config import RunConfig, TrainingConfig
from rayk.errors import InputError


def make_optimizer(parameters: Sequence[Tensor], settings: TrainingConfig) -> torch.optim.Optimizer:
    """Return the optimizer `training.optimizer` on `parameters`; `set_learning_rate` sets its rate at every step.

    Raises:
        InputError: its package is not installed.
    """
    assert settings.learning_rate is not None  # `RunConfig` sets it
    groups = _decay_groups(parameters, settings.weight_decay)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=True)
    check_optimizer(settings)
    from torchao.optim import AdamW8bit

    optimizer = AdamW8bit(groups, lr=settings.learning_rate, betas=settings.betas)
    if parameters[0].device.type == "cpu":
        # torchao compiles its step for each shape of a parameter, which takes longer on a CPU than a short run.
        optimizer.step = torch.compiler.set_stance("force_eager")(optimizer.step)
    return optimizer


def check_optimizer(settings: TrainingConfig) -> None:
    """Check that the package of `training.optimizer` is installed.

    Raises:
        InputError: it is not.
    """
    if settings.optimizer == "adamw_8bit" and importlib.util.find_spec("torchao") is None:
        raise InputError(
            "training.optimizer 'adamw_8bit' needs torchao; install it with pip install 'rayk[torchao]', or use "
            "'adamw'."
        )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao's, which compiled steps read
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def count_steps(config: RunConfig, rows: int) -> int:
    """Return the number of optimizer steps: `training.steps`, or those of `training.epochs` passes over `rows` rows, at
    least one."""
    training, samples = config.training, config.rollouts.samples if config.rollouts else 1
    if training.steps is not None:
        return training.steps
    assert training.epochs is not None
    return max(1, round(training.epochs * rows * samples / training.batch_size))


def warmup_steps(settings: TrainingConfig, total_steps: int) -> int:
    """Return the number of steps over which the learning rate rises."""
    if settings.warmup_steps is not None:
        return settings.warmup_steps
    return round((settings.warmup_share or 0.0) * total_steps)


def learning_rate_at(step: int, total_steps: int, settings: TrainingConfig, peak: float | None = None) -> float:
    """Return the rate of step `step` (from 0): linear warm-up, then the schedule down to `final_learning_rate`.

    Args:
        peak: the highest rate; None: `settings.learning_rate`.
    """
    peak = settings.learning_rate if peak is None else peak
    assert peak is not None
    warmup = warmup_steps(settings, total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total_steps - warmup)
    share = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[settings.schedule]
    return peak * (settings.final_learning_rate + (1 - settings.final_learning_rate) * share)


def _decay_groups(parameters: Sequence[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups with weight decay for matrices, and without it for norms and biases."""
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
