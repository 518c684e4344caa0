"""One optimizer update: gradients of an experience's micro-batches, summed over the workers."""

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from rayk.config import TrainingConfig
from rayk.data.batches import micro_batches
from rayk.errors import InputError, RunFailed
from rayk.losses import sequence_mean, token_mean
from rayk.methods import Experience
from rayk.training.optimizer import make_optimizer
from rayk.training.ranks import Ranks
from rayk.training.student import UNUSABLE, LossModule, wrap_for_ddp


class Learner:
    """The weights of one rank and their optimizer.

    Args:
        module: student and loss, on `device`.
        averages_sequences: give each sequence, instead of each unit, the same weight.
    """

    def __init__(
        self, module: LossModule, settings: TrainingConfig, ranks: Ranks, device: str, averages_sequences: bool = False
    ):  # fmt: skip
        self.module, self._settings, self._ranks, self._device = module, settings, ranks, device
        self._averages_sequences = averages_sequences
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self._parameters, settings)
        self._wrapped: Any = module
        self._checked: set[tuple[type[Experience], bool]] = set()
        """Kinds of experiences whose loss has been checked: its type, and whether it is auxiliary."""
        self.is_mid_step = False
        """Whether some but not all updates of the current step are done, so that the weights must not be saved."""

    def wrap(self) -> None:
        """Wrap the module for DDP. A collective: all ranks must call it."""
        self._wrapped = wrap_for_ddp(self.module)

    def train_step(self, experiences: Iterable[Experience], step: int, learning_rate: float) -> dict[str, float]:
        """Make one update with each of the experiences of `step`; return the mean of each metric, weighted by units."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        updates = []
        for experience in experiences:
            updates.append(self._update(experience, step))
            self.is_mid_step = True
        self.is_mid_step = False
        return _weighted_means(updates)

    def _update(self, experience: Experience, step: int) -> tuple[float, dict[str, float]]:
        """Make one optimizer update; return its number of units (or sequences) and the means over them.

        The mean loss of the auxiliary experience, over its own units, is added.
        """
        means: dict[str, float] = {}
        parts = [part for part in (experience, experience.auxiliary) if part is not None]
        counts = self._ranks.sums([self._count(part) for part in parts])
        for part, count in zip(parts, counts, strict=True):
            sums = self._backward(part, count, is_auxiliary=part is not experience)
            names = sorted(sums)
            totals = dict(zip(names, self._ranks.sums([sums[name] for name in names]), strict=True))
            means |= {name: total / max(count, 1) + means.get(name, 0.0) for name, total in totals.items()}
        if means.get(UNUSABLE) and self._settings.unusable_rows == "stop":
            self._ranks.agree(
                RunFailed(
                    f"In step {step + 1}, tokens are more than method.ratio_limit times as likely as when they were "
                    "sampled; lower training.learning_rate, rollouts.max_staleness or method.inner_epochs, or set "
                    "training.unusable_rows to skip."
                )
            )
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._settings.max_grad_norm or math.inf)
        self._ranks.agree(
            None
            if math.isfinite(float(norm))
            else RunFailed(
                f"The gradient of step {step + 1} is not finite; lower training.learning_rate, or set warmup_steps."
            )
        )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return counts[0], {**means, "gradient_norm": float(norm)}

    def _backward(self, experience: Experience, count: float, is_auxiliary: bool) -> dict[str, float]:
        """Compute the gradients of the loss; return sums of the loss and its terms over this rank's units (or of their
        means over its sequences)."""
        groups = micro_batches(experience.lengths, self._settings.micro_batch_tokens)
        sums: dict[str, Tensor] = {}
        for number, rows in enumerate(groups, start=1):
            part = experience.select(rows).to(self._device)
            is_last = self._ranks.world == 1 or number == len(groups)
            with nullcontext() if is_last else self._wrapped.no_sync():
                per_token, terms = self._forward(part, is_auxiliary)
                # DDP averages gradients over ranks, but the loss is summed over them.
                (self._mean(per_token, part, count) * self._ranks.world).backward()
            for name, term in {"loss": per_token.detach(), **terms}.items():
                sums[name] = sums.get(name, torch.zeros((), device=self._device)) + self._mean(term, part, 1)
        return {name: float(value) for name, value in sums.items()}

    def _count(self, experience: Experience) -> int:
        """Return what the mean loss is divided by: the number of units, or of sequences with units."""
        return int((experience.offsets.diff() > 0).sum()) if self._averages_sequences else experience.count

    def _mean(self, values: Tensor, part: Experience, count: float) -> Tensor:
        """Return the share of a micro-batch's units in the mean over `count` units, or sequences."""
        if self._averages_sequences:
            return sequence_mean(values, part.offsets, count)
        return token_mean(values, count)

    def _forward(self, part: Experience, is_auxiliary: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its terms. All ranks together check the first loss of each kind of experience."""
        kind = (type(part), is_auxiliary)
        if kind in self._checked:
            return self._wrapped(part)
        problem: InputError | None = None
        try:
            per_token, terms = self._wrapped(part)
            _check_loss(per_token, terms, part.count)
        except InputError as error:
            problem = error
        self._ranks.agree(problem)
        self._checked.add(kind)
        return per_token, terms


def _check_loss(per_token: Tensor, terms: dict[str, Tensor], count: int) -> None:
    """Check the values that a method's loss returned for `count` units.

    Raises:
        InputError: a shape is wrong, or the loss is not finite or has no gradient.
    """
    for name, values in {"per_token": per_token, **terms}.items():
        if values.shape != (count,):
            raise InputError(
                f"The method's Loss has '{name}' of shape {list(values.shape)}, but this micro-batch has {count} "
                f"counted tokens; return one value per counted token, [{count}], and do not average them."
            )
    if not per_token.requires_grad:
        raise InputError(
            "The method's loss has no gradient; compute it from student.hidden(batch) and student.head, without detach."
        )
    if not bool(per_token.isfinite().all()):
        raise InputError(
            "The method's loss is not finite in the first step; check it for logarithms of 0 and divisions by 0, or "
            "lower training.learning_rate."
        )


def _weighted_means(updates: Sequence[tuple[float, dict[str, float]]]) -> dict[str, float]:
    """Return the mean of each metric over the updates, weighted by their units."""
    if len(updates) == 1:
        return updates[0][1]
    total = max(sum(count for count, _ in updates), 1)
    return {name: sum(count * means[name] for count, means in updates) / total for name in updates[0][1]}
