"""Layer-wise distillation: the student's layers learn the hidden states of the teacher's layers (FitNets, Romero et al.
2015, arXiv 1412.6550; with filters TED, Liang et al. 2023, arXiv 2210.01351).

    L = (1/N) Σ_t [ α·(−log q(y_t)) + (1−α)·T^s·D(p_T ‖ q_T)_t + w·(1/K) Σ_k d(f_k^S(h_k^S), f_k^T(h_k^T))_t ]

over K pairs of layers, s = 2 with `temperature_squared`, else 0. h_k are the outputs of the layers of pair k, before
the final norm, at the positions that predict the counted tokens; padding has none. d is the mean squared difference, or
1 − cosine. With `distance: attention`, h_k are the queries, keys and values of the layers, f_k the identity, and d is
the sum of the three divergences of their relations (MiniLMv2, Wang et al. 2021, arXiv 2012.15828).

Without filters, f_k^T is the identity, and f_k^S a trained linear projection where the widths of the models differ,
else the identity. With filters (TED) the first `filters.steps` steps train f_k^S and f_k^T, with both models frozen
(`rayk.methods.layer_filters`), and the other steps minimize L over the student and f_k^S. Projections and filters are
part of the checkpoints, and not of the saved model.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rayk.config import LayerwiseConfig
from rayk.data.batches import Batch
from rayk.errors import InputError
from rayk.losses import FEATURE_DISTANCES, linear_cross_entropy, relation_divergence
from rayk.methods.base import Experience, Loss, Method, Student, StudentOutput
from rayk.methods.layer_filters import Filters
from rayk.methods.matching import soft_loss
from rayk.models import Head
from rayk.rollouts import Policy
from rayk.teachers import Scorer

_LEAST_SIZE = 32
"""Least numbers in a part of a relation head, unless the user says how many parts there are."""


@dataclass(frozen=True)
class _Computed:
    """A student whose hidden states have been computed."""

    head: Head
    states: Tensor

    def hidden(self, _batch: Batch) -> Tensor:
        return self.states


class Layerwise(Method):
    """Layer-wise distillation; see the module's docstring. Settings: `rayk.config.LayerwiseConfig`."""

    settings: LayerwiseConfig
    kind = "layerwise"
    summary = "the student's layers learn the hidden states of the teacher's layers"
    paper = "Romero et al. 2015 (FitNets); Liang et al. 2023 (TED)"
    needs = (
        "layers: about 1.06·width bytes a token and layer (8 bits a number), and 2·width + 4 for the teacher's "
        "distribution; engine kind 'transformers'"
    )

    def __init__(self, settings: LayerwiseConfig, teacher: Scorer | None, policy: Policy | None = None):
        super().__init__(settings, teacher, policy)
        self._layers: list[int] = []
        self._projections: nn.ModuleList | None = None
        self._filters: Filters | None = None
        self._widths: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
        self._relation_heads = 1
        self._step = 0

    @property
    def trains_in_stages(self) -> bool:
        return self.settings.filters is not None

    def start(self, student: Student) -> None:
        """Create filters or projections for the widths of both models."""
        self._layers = student.layer_numbers(self.settings.student_layers)
        teacher: Any = self.teacher
        if self.settings.distance == "attention":
            self._widths = student.attention_widths, teacher.info.attention_widths
            self._relation_heads = relation_heads(self.settings.relation_heads, self._widths)
            return
        count, widths = len(self._layers), (student.layer_width, teacher.info.hidden_size)
        if self.settings.filters is not None:
            self._filters = Filters(count, *widths, self.settings.filters.kind)
        elif widths[0] != widths[1]:
            self._projections = nn.ModuleList(nn.Linear(*widths) for _ in range(count))

    def modules(self) -> nn.Module | None:
        return self._projections if self._filters is None else self._filters

    async def prepare(self, batch: Batch) -> Experience:
        assert self.teacher is not None
        return Experience(batch, await self.teacher.ascore(batch, self.settings.support))

    def loss(self, student: Student, experience: Experience) -> Loss:
        filters = self.settings.filters
        if filters is not None and self._step < filters.steps:
            return self._filter_loss(student, experience)
        final, states = student.layer_states(experience.batch, self._layers, self.settings.support.part)
        loss, terms = self._output_loss(_Computed(student.head, final), experience)
        distances = self._distances(states, experience)
        terms |= {f"layer_distance_{number}": distance for number, distance in enumerate(distances, start=1)}
        mean = torch.stack(distances).mean(dim=0)
        return Loss(loss + self.settings.layer_weight * mean, {**terms, "layer_distance": mean})

    def on_step(self, step: int) -> None:
        self._step = step

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step = state["step"]

    def _filter_loss(self, student: Student, experience: Experience) -> Loss:
        """Return the loss of the first stage, which has a gradient in the filters and their norms only."""
        signals = experience.signals
        assert self._filters is not None and signals is not None and signals.head is not None
        with torch.no_grad():
            final, states = student.layer_states(experience.batch, self._layers)
        losses = self._filters.task_losses(
            states, self._teacher_states(experience), signals.head, experience.batch.targets, final.dtype
        )
        terms = {"student_filter_loss": losses[0], "teacher_filter_loss": losses[1]}
        return Loss(losses[0] + losses[1], terms)

    def _output_loss(self, student: StudentOutput, experience: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """Return α·cross-entropy + (1−α)·divergence at each counted token, and their terms."""
        alpha, signals = self.settings.hard_label_weight, experience.signals
        assert signals is not None
        if not self.settings.uses_divergence:
            hidden = student.hidden(experience.batch)
            cross_entropy = linear_cross_entropy(hidden, student.head, experience.batch.targets)
            return cross_entropy, {"cross_entropy": cross_entropy}
        soft, terms = soft_loss(self.settings, student, replace(experience, signals=signals.as_hidden()))
        return alpha * terms["cross_entropy"] + (1 - alpha) * soft if alpha else soft, terms

    def _distances(self, states: Sequence[Tensor], experience: Experience) -> list[Tensor]:
        """Return the distance of each pair's states at each counted token."""
        targets = self._teacher_states(experience)
        if self.settings.distance == "attention":
            offsets = experience.batch.offsets
            return [self._relation_distance(*pair, offsets) for pair in zip(states, targets, strict=True)]
        if self._filters is not None:
            states, targets = self._filters.student_states(states), self._filters.teacher_states(targets)
        elif self._projections is not None:
            states = [project(each.float()) for project, each in zip(self._projections, states, strict=True)]
        distance = FEATURE_DISTANCES[self.settings.distance]
        return [distance(*pair) for pair in zip(states, targets, strict=True)]

    def _relation_distance(self, student: Tensor, teacher: Tensor, offsets: Tensor) -> Tensor:
        """Return the divergences of the relations among queries, keys and values, summed."""
        parts = zip(student.split(self._widths[0], dim=1), teacher.split(self._widths[1], dim=1), strict=True)
        return torch.stack([relation_divergence(*pair, offsets, self._relation_heads) for pair in parts]).sum(dim=0)

    def _teacher_states(self, experience: Experience) -> list[Tensor]:
        signals = experience.signals
        assert signals is not None
        return [signals.layer_states(place) for place in range(self.settings.support.count)]


def relation_heads(number: int | None, widths: Sequence[Sequence[int]]) -> int:
    """Return the number of relation heads: `number`, or the largest that divides all widths and leaves at least
    `_LEAST_SIZE` numbers to each part.

    Args:
        widths: of queries, keys and values, for student and teacher.

    Raises:
        InputError: `number` does not divide them all, or the teacher's engine does not return them.
    """
    if not all(itertools.chain(*widths)):
        raise InputError(
            "method.distance 'attention' needs queries, keys and values, which the teacher's engine does not return; "
            "choose engine kind 'transformers', or another distance."
        )
    common = math.gcd(*itertools.chain(*widths))
    if number is None:
        divisors = [each for each in range(1, common + 1) if common % each == 0]
        return max((each for each in divisors if common // each >= _LEAST_SIZE), default=1)
    if common % number:
        raise InputError(
            f"method.relation_heads is {number}, but must divide the sizes of queries, keys and values: "
            f"{', '.join(map(str, widths[0]))} in the student, {', '.join(map(str, widths[1]))} in the teacher."
        )
    return number
