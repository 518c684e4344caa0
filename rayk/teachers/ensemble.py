"""Average several teachers (`Ensemble`), or choose a teacher for each row (`Route`).

Both have the interface of a single teacher, and both query their teachers at the same time.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rayk.config import RouteConfig, RunConfig
from rayk.config.support import Hidden, Requested, Support, TopK
from rayk.errors import InputError
from rayk.models import Head
from rayk.signals.batch import SignalBatch, concatenate, fill_distinct
from rayk.signals.sequence import TokenSequence
from rayk.teachers.client import HasSequences, Scorer, Teacher, sequences_of


class Ensemble:
    """The weighted mean of several teachers' probabilities or logits (BabyLlama, arXiv 2308.02019).

    Support `topk` takes two requests: first each teacher's own most likely ids, then all teachers' log-probs at the
    union of these ids, so that no probability is missing. On the union

    - the mean of probabilities p̄ = Σ w·p is exact, including the tail;
    - the mean of logits p̄ ∝ Π p^w is exact except for the tail. Its mass Σ_rest Π p^w is at most Π (Σ_rest p)^w
      (Hölder), and this bound is used. It is too high by 0.05 to 0.2 of the total mass for two random models, whose
      distributions are flat and disagree, and accurate where the union contains most of the mass. `hidden` has no
      such bias.

    Support `hidden` with the mean of logits is exact: the weighted heads of the teachers, concatenated, form one head.
    """

    def __init__(self, teachers: Sequence[Scorer], weights: Sequence[float], combine: str):
        self.teachers = list(teachers)
        self.weights = [weight / sum(weights) for weight in weights]
        self.combine = combine
        self._joint: tuple[list[Head], Head] | None = None

    @property
    def vocab_size(self) -> int:
        return self.teachers[0].vocab_size

    async def ascore(
        self, batch: HasSequences | Sequence[TokenSequence], support: Support | None = None
    ) -> SignalBatch:
        """Like `Teacher.ascore`.

        Raises:
            InputError: this mean cannot be computed from signals of this support.
        """
        sequences, support = sequences_of(batch), support or TopK()
        check_ensemble(support, self.combine)
        if isinstance(support, Hidden):
            return self._concatenate_heads(await self._score_all(sequences, support), sequences)
        assert isinstance(support, TopK)
        if support.k * len(self.teachers) >= self.vocab_size:
            full = TopK(self.vocab_size, support.temperatures)
            return self._mean(await self._score_all(sequences, full), support)
        top_signals = await self._score_all(sequences, support)
        union = _union([signals.ids for signals in top_signals if signals.ids is not None])
        requests = _with_requested_ids(sequences, union)
        return self._mean(await self._score_all(requests, Requested(0, support.temperatures)), support)

    async def _score_all(self, sequences: list[TokenSequence], support: Support) -> list[SignalBatch]:
        return list(await asyncio.gather(*(teacher.ascore(sequences, support) for teacher in self.teachers)))

    def _mean(self, signals: list[SignalBatch], support: TopK) -> SignalBatch:
        weights = torch.tensor(self.weights)
        by_id = [_sort_by_id(one) for one in signals]
        ids = by_id[0][0]
        logprobs = torch.stack([sorted_logprobs for _, sorted_logprobs in by_id], dim=2)
        tails = torch.stack([_get_column(one, "log_tails") for one in signals], dim=2)
        targets = torch.stack([one.target_logprobs for one in signals], dim=1)
        if self.combine == "probabilities":
            mean, tail, target = ((part + weights.log()).logsumexp(-1) for part in (logprobs, tails, targets))
        else:
            mean, tail, target = (_weighted_sum(part, weights) for part in (logprobs, tails, targets))
            tail_at_one = _weighted_sum(_tails_at_one(signals), weights)
            normalizer = torch.cat([mean, tail_at_one[:, None]], dim=1).logsumexp(1)
            mean, target = mean - normalizer[:, None], target - normalizer
            tail = tail - normalizer[:, None] / torch.tensor(support.temperatures)
        order = mean.argsort(dim=1, descending=True)
        return replace(
            signals[0], support=TopK(ids.shape[1], support.temperatures), ids=ids.gather(1, order),
            logprobs=mean.gather(1, order), log_tails=tail, target_logprobs=target,
        )  # fmt: skip

    def _concatenate_heads(self, signals: list[SignalBatch], sequences: list[TokenSequence]) -> SignalBatch:
        heads = [one.head for one in signals if one.head is not None]
        if any(head.softcap is not None for head in heads):
            raise InputError("The logits of teachers with a soft-cap cannot be averaged exactly; use support 'topk'.")
        joint = replace(
            signals[0], hidden=torch.cat([_get_column(one, "hidden") for one in signals], dim=1),
            head=self._joint_head(heads),
        )  # fmt: skip
        targets = torch.from_numpy(np.concatenate([sequence.targets for sequence in sequences]).astype(np.int64))
        logprobs = [
            joint.slice_tokens(slice(start, start + 256)).logits().log_softmax(1).gather(1, part[:, None])[:, 0]
            for start, part in zip(range(0, len(targets), 256), targets.split(256), strict=True)
        ]
        return replace(joint, target_logprobs=torch.cat(logprobs)) if logprobs else joint

    def _joint_head(self, heads: list[Head]) -> Head:
        """Return the head of the weighted mean of the members' logits. It is kept for later calls with these heads."""
        if self._joint is not None and all(one is other for one, other in zip(self._joint[0], heads, strict=True)):
            return self._joint[1]
        columns = min(head.vocab_size for head in heads)
        parts = list(zip(heads, self.weights, strict=True))
        biases = [head.bias[:columns].float() * head.scale * weight for head, weight in parts if head.bias is not None]
        head = Head(
            torch.cat([head.weight[:columns].float() * head.scale * weight for head, weight in parts], dim=1),
            sum(biases, torch.zeros(columns)) if biases else None,
        )
        self._joint = heads, head
        return head


class Route:
    """Scores each row with one of several teachers, chosen by a field of the row."""

    def __init__(self, settings: RouteConfig, teachers: Mapping[str, Scorer]):
        self.settings = settings
        self.teachers = teachers

    @property
    def vocab_size(self) -> int:
        return next(iter(self.teachers.values())).vocab_size

    async def ascore(
        self, batch: HasSequences | Sequence[TokenSequence], support: Support | None = None
    ) -> SignalBatch:
        """Like `Teacher.ascore`; the signals are in the order of the rows."""
        sequences = sequences_of(batch)
        rows_by_name: dict[str, list[int]] = {}
        for row, sequence in enumerate(sequences):
            rows_by_name.setdefault(choose_teacher_name(sequence, self.settings), []).append(row)
        parts = await asyncio.gather(
            *(
                self.teachers[name].ascore([sequences[row] for row in rows], support)
                for name, rows in rows_by_name.items()
            )
        )
        place = {row: i for i, row in enumerate(row for rows in rows_by_name.values() for row in rows)}
        return concatenate(parts).select([place[row] for row in range(len(sequences))])


def build_scorer(config: RunConfig, teachers: Mapping[str, Teacher]) -> Scorer | None:
    """Return the route, the ensemble or the single teacher that gives the run's signals; None without a teacher.

    Raises:
        InputError: a member of the ensemble does not support the ensemble's requests.
    """
    known: dict[str, Scorer] = dict(teachers)
    if config.ensemble is not None:
        names = config.ensemble.teachers or list(teachers)
        if isinstance(config.signal_support, TopK):
            _check_members([teachers[name] for name in names])
        weights = [config.ensemble.weights.get(name, 1.0) for name in names]
        known["ensemble"] = Ensemble([known[name] for name in names], weights, config.ensemble.combine)
    if config.route is not None:
        return Route(config.route, known)
    return known.get("ensemble") or known.get(config.evaluation_teacher)


def choose_teacher_name(row: TokenSequence, route: RouteConfig) -> str:
    """Return the name of the teacher that a route selects for a row by one of its fields (`rayk.data.Example.fields`).

    Raises:
        InputError: `route.teachers` does not contain the field's value, and there is no default.
    """
    value = str(getattr(row, "fields", {}).get(route.field))
    name = route.teachers.get(value, route.default)
    if name is None:
        raise InputError(
            f"{getattr(row, 'where', '') or 'A row'} has '{value}' in its field '{route.field}', which chooses no "
            "teacher; add the value to route.teachers, or set route.default."
        )
    return name


def check_ensemble(support: Support, combine: str) -> None:
    """Check that signals of this support can be averaged.

    Raises:
        InputError: they cannot be averaged; the message names a support that can.
    """
    if isinstance(support, Hidden) and combine == "logits":
        return
    if not isinstance(support, TopK):
        raise InputError(
            f"An ensemble cannot average the {combine} of '{support.kind}' signals; use support 'topk', or "
            "'hidden' with ensemble.combine: logits."
        )
    if combine == "probabilities" and support.temperatures != (1.0,):
        raise InputError(
            "The mean of probabilities at a temperature does not follow from the teachers' tails; use temperature 1, "
            "or ensemble.combine: logits."
        )


def _check_members(teachers: Sequence[Teacher]) -> None:
    for teacher in teachers:
        if "requested" not in teacher.info.supports:
            raise InputError(
                f"Teacher '{teacher.name}' (engine kind '{teacher.info.engine}') cannot return log-probs at the other "
                "teachers' ids, which an ensemble on support 'topk' requires; use engine kind 'transformers', or "
                "support 'hidden' with ensemble.combine: logits."
            )


def _union(id_columns: list[Tensor]) -> Tensor:
    """Return each position's distinct ids, [tokens, sum of k]; duplicates are replaced with other ids."""
    ids = torch.cat(id_columns, dim=1).sort(dim=1).values
    repeated = torch.cat([torch.zeros_like(ids[:, :1], dtype=torch.bool), ids[:, 1:] == ids[:, :-1]], dim=1)
    return fill_distinct(ids, ~repeated)


def _with_requested_ids(sequences: list[TokenSequence], union: Tensor) -> list[TokenSequence]:
    counts = [sequence.counted_tokens for sequence in sequences]
    return [
        replace(sequence, requested=ids.numpy().astype(np.int32))
        for sequence, ids in zip(sequences, union.split(counts), strict=True)
    ]


def _sort_by_id(signals: SignalBatch) -> tuple[Tensor, Tensor]:
    """Return the ids in ascending order, and their log-probs."""
    assert signals.ids is not None
    assert signals.logprobs is not None
    ids, order = signals.ids.sort(dim=1)
    return ids, signals.logprobs.gather(1, order)


def _tails_at_one(signals: list[SignalBatch]) -> Tensor:
    """Return the log-mass of each teacher's tail at temperature 1, [tokens, teachers]."""
    return torch.stack([one.at_temperature()[1] for one in signals], dim=1)


def _weighted_sum(logprobs: Tensor, weights: Tensor) -> Tensor:
    """Return Σ w·log p over the last axis; -inf with a weight of 0 counts as 0, not as NaN."""
    return torch.where(weights > 0, logprobs * weights, 0.0).sum(-1)


def _get_column(signals: SignalBatch, name: str) -> Tensor:
    column = getattr(signals, name)
    assert column is not None
    return column
