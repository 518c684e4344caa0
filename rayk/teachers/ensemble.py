"""Average several teachers: `Ensemble`, with the interface of a single teacher."""

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rayk.config.support import Hidden, Requested, Support, TopK
from rayk.errors import InputError
from rayk.models import Head
from rayk.signals.batch import SignalBatch, fill_distinct
from rayk.signals.sequence import TokenSequence
from rayk.teachers.client import HasSequences, Scorer, Teacher, sequences_of

_HEAD_ROWS = 256


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
        self._building = threading.Lock()
        # The device of this thread, which computes the losses: the joint head is copied to it once, for both.
        self._device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"

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
            signals = await self._score_all(sequences, support)
            # In a thread, because the event loop is shared by all requests of the process.
            return await asyncio.to_thread(self._concatenate_heads, signals, sequences)
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
        assert joint.head is not None and joint.hidden is not None
        head = joint.head.to(self._device)
        logprobs = []
        for states, ids in zip(joint.hidden.split(_HEAD_ROWS), targets.split(_HEAD_ROWS), strict=True):
            logits = head.logits(states.to(self._device, head.weight.dtype))
            logprobs.append(logits.gather(1, ids[:, None].to(self._device))[:, 0] - logits.logsumexp(1))
        return replace(joint, target_logprobs=torch.cat(logprobs).cpu()) if logprobs else joint

    def _joint_head(self, heads: list[Head]) -> Head:
        """Return the head of the weighted mean of the members' logits. It is built once and kept for later calls with
        these heads."""
        with self._building:
            if self._joint is None or any(one is not other for one, other in zip(self._joint[0], heads, strict=True)):
                self._joint = heads, self._build_joint_head(heads)
            return self._joint[1]

    def _build_joint_head(self, heads: list[Head]) -> Head:
        columns = min(head.vocab_size for head in heads)
        parts = list(zip(heads, self.weights, strict=True))
        biases = [head.bias[:columns].float() * head.scale * weight for head, weight in parts if head.bias is not None]
        return Head(
            torch.cat([head.weight[:columns].float() * head.scale * weight for head, weight in parts], dim=1),
            sum(biases, torch.zeros(columns)) if biases else None,
        )


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


def check_members(teachers: Sequence[Teacher]) -> None:
    """Check that each member can answer the requests of an ensemble on support `topk`.

    Raises:
        InputError: one cannot.
    """
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
