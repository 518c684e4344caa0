"""One optimizer update: gradients of an experience's micro-batches, summed over the workers."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rayk.config import TrainingConfig
from rayk.data.batches import micro_batches
from rayk.errors import InputError, RunFailed
from rayk.methods import Experience
from rayk.models.shards import whole_tensor
from rayk.training.averaging import Averaging, StepMean
from rayk.training.optimizer import make_optimizer, set_learning_rate
from rayk.training.ranks import Ranks
from rayk.training.replication import ReplicatedModule
from rayk.training.sharding import ShardedModule
from rayk.training.student import UNUSABLE, LossModule

_Means = dict[str, tuple[float, float]]
"""Each metric's mean in one update, and its weight among the updates of a step."""


@dataclass(frozen=True)
class _MicroBatch:
    """Units that one forward pass of the loss computes.

    Attributes:
        units: the units' indices in the experience.
        weight: 0 if the units only make up for a micro-batch that this rank lacks.
        parts: the least number of parts of the body's forward pass (`Student.minimum_parts`).
    """

    units: list[int]
    weight: float = 1.0
    parts: int = 1


class Learner:
    """The weights of one rank and their optimizer.

    Args:
        module: student and loss, on `device`.
        averaging: the mean that the loss is, and the means that are recorded.
    """

    def __init__(
        self, module: LossModule, settings: TrainingConfig, ranks: Ranks, device: str,
        averaging: Averaging | None = None,
    ):  # fmt: skip
        self.module, self._settings, self._ranks, self._device = module, settings, ranks, device
        self._averaging = averaging or Averaging()
        self.parallel: ReplicatedModule | ShardedModule
        """The module with the communication between the ranks."""
        if settings.sharding == "none":
            self.parallel = ReplicatedModule(module.to(device))
        else:
            self.parallel = ShardedModule(module, settings, ranks, device)
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self._parameters, settings)
        self._checked: set[tuple[type[Experience], bool]] = set()
        """Kinds of experiences whose loss has been checked: its type, and whether it is auxiliary."""
        self.is_mid_step = False
        """Whether some but not all updates of the current step are done, so that the weights must not be saved."""

    def train_step(self, experiences: Iterable[Experience], step: int, learning_rate: float) -> dict[str, float]:
        """Make one update with each of the experiences of `step`; return the mean of each metric, weighted by units."""
        set_learning_rate(self.optimizer, learning_rate)
        updates = []
        for experience in experiences:
            updates.append(self._update(experience, step))
            self.is_mid_step = True
        self.is_mid_step = False
        return _weighted_means(updates)

    def _update(self, experience: Experience, step: int) -> _Means:
        """Make one optimizer update; return the means of the metrics.

        The mean loss of the auxiliary experience, over its own units, is added.
        """
        means: dict[str, float] = {}
        weights: dict[str, float] = {}
        wholes = self._averaging.count(experience, experience.auxiliary, self._ranks)
        parts = [part for part in (experience, experience.auxiliary) if part is not None]
        for part, whole in zip(parts, wholes, strict=True):
            sums = self._backward(part, whole, is_auxiliary=part is not experience)
            names = sorted(sums)
            totals = dict(zip(names, self._ranks.sums([sums[name] for name in names]), strict=True))
            for name, (mean, weight) in whole.means(totals).items():
                means[name] = mean + means.get(name, 0.0)
                weights[name] = weight if part is experience else wholes[0].divisor
        if means.get(UNUSABLE) and self._settings.unusable_rows == "stop":
            self._ranks.agree(
                RunFailed(
                    f"In step {step + 1}, tokens are more than method.ratio_limit times as likely as when they were "
                    "sampled; lower training.learning_rate, rollouts.max_staleness or method.inner_epochs, or set "
                    "training.unusable_rows to skip."
                )
            )
        self.parallel.drop_unused_gradients()
        norm = whole_tensor(torch.nn.utils.clip_grad_norm_(self._parameters, self._settings.max_grad_norm or math.inf))
        self._ranks.agree(
            None
            if math.isfinite(float(norm))
            else RunFailed(
                f"The gradient of step {step + 1} is not finite; lower training.learning_rate, or set warmup_steps."
            )
        )
        self.optimizer.step()
        self.optimizer.zero_grad()
        means["gradient_norm"], weights["gradient_norm"] = float(norm), wholes[0].divisor
        return {name: (mean, weights[name]) for name, mean in means.items()}

    def _backward(self, experience: Experience, whole: StepMean, is_auxiliary: bool) -> dict[str, float]:
        """Compute the gradients of the loss; return the sums of the metrics over this rank's units, by which `whole`
        computes their means."""
        micro_batches = self._micro_batches(experience)
        sums: dict[str, Tensor] = {}
        for number, micro_batch in enumerate(micro_batches, start=1):
            selected = experience.select(micro_batch.units)
            part, mean = selected.to(self._device), whole.of(selected, self._device)
            with self.parallel.micro_batch(is_last=number == len(micro_batches)):
                self.module.student.minimum_parts = micro_batch.parts
                per_token, terms = self._forward(part, is_auxiliary)
                self.module.student.minimum_parts = 1
                # The ranks' gradients are averaged, but the loss is summed over the ranks.
                scale = self._ranks.world * micro_batch.weight
                (mean.share(per_token) * scale).backward()
            if micro_batch.weight:
                for name, total in mean.sums({"loss": per_token.detach(), **terms}).items():
                    sums[name] = sums.get(name, torch.zeros((), device=self._device)) + total
        return {name: float(value) for name, value in sums.items()}

    def _micro_batches(self, experience: Experience) -> list[_MicroBatch]:
        """Cut the experience into micro-batches of at most `micro_batch_tokens`, in a way that gives all ranks the same
        collectives."""
        lengths = experience.lengths
        planned = [_MicroBatch(units) for units in micro_batches(lengths, self._settings.micro_batch_tokens)]
        if isinstance(self.parallel, ReplicatedModule):
            return planned
        if self.parallel.equalizes:
            [number] = self._ranks.maxima([len(planned)])
            shortest = min(range(len(lengths)), key=lengths.__getitem__)
            planned += [_MicroBatch([shortest], weight=0.0)] * (int(number) - len(planned))
        # A pass that reduces gradients does so in each part of the body's forward pass.
        alike = planned if self.parallel.equalizes else planned[-1:]
        count_parts = self.module.student.count_parts
        parts = self._ranks.maxima([count_parts(experience.select(each.units).batch) for each in alike])
        alike = [replace(each, parts=int(least)) for each, least in zip(alike, parts, strict=True)]
        return [*planned[: -len(alike)], *alike]

    def _forward(self, part: Experience, is_auxiliary: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its terms. All ranks together check the first loss of each kind of experience."""
        kind = (type(part), is_auxiliary)
        if kind in self._checked:
            return self.parallel(part)
        problem: InputError | None = None
        self.parallel.gather()  # a loss that fails on this rank must not let others wait for its weights
        try:
            per_token, terms = self.parallel(part)
            _check_loss(per_token, terms, part.count)
        except InputError as error:
            problem = error
        self._ranks.agree(problem)
        self.parallel.release()
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


def _weighted_means(updates: Sequence[_Means]) -> dict[str, float]:
    """Return the mean of each metric over the updates that have it."""
    if len(updates) == 1:
        return {name: mean for name, (mean, _) in updates[0].items()}
    means = {}
    for name in dict.fromkeys(name for update in updates for name in update):
        found = [update[name] for update in updates if name in update]
        means[name] = sum(weight * mean for mean, weight in found) / max(sum(weight for _, weight in found), 1)
    return means
