"""The mean that is a step's loss, over all workers and micro-batches, and means over groups of tokens for metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from rayk.config import Normalization, RouteConfig
from rayk.losses import group_mean, sequence_mean, token_mean
from rayk.methods import Experience
from rayk.teachers import choose_teacher_name
from rayk.training.ranks import Ranks

QUARTERS = 4


class TokenGroups(Protocol):
    """A division of the counted tokens into groups, whose means are recorded."""

    @property
    def count(self) -> int:
        """Number of groups."""
        ...

    def metric_names(self, term: str) -> list[str]:
        """Return the name of each group's mean of a loss term; none if the term is not recorded by group."""
        ...

    def of_tokens(self, experience: Experience) -> Tensor:
        """Return the index of each counted token's group, int64 [tokens]."""
        ...


class TeacherGroups:
    """The tokens of each teacher of a route. Every term is recorded, as `teacher/NAME/TERM`."""

    def __init__(self, route: RouteConfig):
        self.teachers = route.names
        self._route = route

    @property
    def count(self) -> int:
        return len(self.teachers)

    def metric_names(self, term: str) -> list[str]:
        return [f"teacher/{name}/{term}" for name in self.teachers]

    def of_tokens(self, experience: Experience) -> Tensor:
        names = [choose_teacher_name(row, self._route) for row in experience.batch.sequences]
        teachers = torch.tensor([self.teachers.index(name) for name in names])
        return teachers.repeat_interleave(experience.batch.offsets.diff())


class Quarters:
    """The quarters of each row's counted tokens. One term is recorded, as `distance_quarter_1` to `4`."""

    count = QUARTERS

    def __init__(self, term: str):
        self._term = term

    def metric_names(self, term: str) -> list[str]:
        return [f"distance_quarter_{number + 1}" for number in range(QUARTERS)] if term == self._term else []

    def of_tokens(self, experience: Experience) -> Tensor:
        offsets = experience.batch.offsets
        lengths = offsets.diff()
        within = torch.arange(int(offsets[-1])) - offsets[:-1].repeat_interleave(lengths)
        return QUARTERS * within // lengths.repeat_interleave(lengths)


@dataclass(frozen=True)
class Averaging:
    """How the loss of a step is averaged (`method.normalize`), and which means are recorded besides.

    Attributes:
        teachers: the teachers of the run's route; needed for `teachers`.
        groups: further groups.
    """

    normalization: Normalization = "tokens"
    teachers: TeacherGroups | None = None
    groups: Sequence[TokenGroups] = field(default_factory=tuple)

    def count(self, experience: Experience, auxiliary: Experience | None, ranks: Ranks) -> "list[StepMean]":
        """Return the mean of a step's experience, and that of its auxiliary one, over its own units. A collective."""
        groups: list[TokenGroups] = []
        if experience.has_token_units:
            groups = [*([] if self.teachers is None else [self.teachers]), *self.groups]
        is_by_sequence = self.normalization == "sequences"
        sizes = [float((experience.offsets.diff() > 0).sum()) if is_by_sequence else float(experience.count)]
        for each in groups:
            sizes += torch.bincount(each.of_tokens(experience), minlength=each.count).tolist()
        totals = ranks.sums([*sizes, *([] if auxiliary is None else [float(auxiliary.count)])])
        places = accumulate((each.count for each in groups), initial=1)
        by_group = [
            torch.tensor(totals[place : place + each.count], dtype=torch.float64)
            for each, place in zip(groups, places, strict=False)
        ]
        divisor = float((by_group[0] > 0).sum()) if self.normalization == "teachers" else totals[0]
        means = [StepMean(self.normalization, divisor, groups, by_group)]
        return means if auxiliary is None else [*means, StepMean("tokens", totals[-1])]


@dataclass(frozen=True)
class StepMean:
    """The mean over the units of one experience on all workers.

    Attributes:
        divisor: number of units, of sequences with tokens, or of teachers with tokens.
        groups: recorded groups; the first one is that of the teachers with `teachers`.
        sizes: number of tokens of each group, one tensor for each of `groups`.
    """

    normalization: Normalization
    divisor: float
    groups: Sequence[TokenGroups] = ()
    sizes: Sequence[Tensor] = ()

    def of(self, part: Experience, device: torch.device | str = "cpu") -> "PartOfMean":
        """Return the part of the mean that a micro-batch, which is on the CPU, contributes, for values on `device`."""
        return PartOfMean(self, part.offsets.to(device), [each.of_tokens(part).to(device) for each in self.groups])

    def means(self, sums: Mapping[str, float]) -> dict[str, tuple[float, float]]:
        """Return the mean of each metric from its sum over all micro-batches and workers, and the mean's weight among
        several updates; groups without tokens are left out."""
        sizes = dict[str, float]()
        for groups, counts in zip(self.groups, self.sizes, strict=True):
            for term in sums:
                sizes |= zip(groups.metric_names(term), counts.tolist(), strict=False)
        weights = {name: sizes.get(name, self.divisor) for name in sums}
        return {
            name: (total / max(weights[name], 1), weights[name])
            for name, total in sums.items()
            if weights[name] or name not in sizes
        }


@dataclass(frozen=True)
class PartOfMean:
    """A micro-batch's part of a `StepMean`."""

    whole: StepMean
    offsets: Tensor
    groups_of_tokens: Sequence[Tensor]

    def share(self, values: Tensor, divisor: float | None = None) -> Tensor:
        """Return the part of the mean of `values` [units] that these units contribute.

        Args:
            divisor: 1 for a sum, which is divided later; None for that of the mean.
        """
        divisor = self.whole.divisor if divisor is None else divisor
        if self.whole.normalization == "sequences":
            return sequence_mean(values, self.offsets, divisor)
        if self.whole.normalization == "teachers":
            sizes = self.whole.sizes[0].to(values.device)
            return group_mean(values, self.groups_of_tokens[0], sizes, divisor)
        return token_mean(values, divisor)

    def sums(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the sum of each metric: of each term, and of the terms by group."""
        sums = {name: self.share(term, 1) for name, term in terms.items()}
        for groups, of_tokens in zip(self.whole.groups, self.groups_of_tokens, strict=True):
            for term, values in terms.items():
                if names := groups.metric_names(term):
                    by_group = torch.zeros(groups.count, device=values.device).index_add_(0, of_tokens, values.float())
                    sums |= zip(names, by_group, strict=True)
        return sums
