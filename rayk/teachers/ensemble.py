"""Several teachers that answer as one (`Ensemble`), and a teacher for each row (`Route`).

Both are asked as a single teacher is, and both ask all their teachers at the same time.
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
    """The weighted mean of several teachers, of their probabilities or of their logits (BabyLlama, arXiv 2308.02019).

    `topk` takes two questions: each teacher's own likeliest ids first, then everybody's log-probs at the union of them,
    so that no teacher is taken for 0 where only another has named an id. On that union

    - the mean of probabilities p̄ = Σ w·p is exact, tail included;
    - the mean of logits p̄ ∝ Π p^w is exact but for the tail, whose mass Σ_rest Π p^w is known only to be at most
      Π (Σ_rest p)^w (Hölder); that bound is taken. So the tail comes out too heavy where teachers are flat and
      disagree (by .05 to .2 of all mass for two random models), and right where the union holds most of the mass;
      `hidden` has no such bias.

    `hidden` with the mean of logits is exact: the teachers' heads, weighted, side by side are one head.
    """

    def __init__(self, teachers: Sequence[Scorer], weights: Sequence[float], combine: str):
        self.teachers = list(teachers)
        self.weights = [weight / sum(weights) for weight in weights]
        self.combine = combine

    @property
    def vocab_size(self) -> int:
        return self.teachers[0].vocab_size

    async def ascore(
        self, batch: HasSequences | Sequence[TokenSequence], support: Support | None = None
    ) -> SignalBatch:
        """As `Teacher.ascore`.

        Raises:
            InputError: this mean cannot be made of such signals.
        """
        sequences, support = sequences_of(batch), support or TopK()
        check_ensemble(support, self.combine)
        if isinstance(support, Hidden):
            return self._side_by_side(await self._each(sequences, support), sequences)
        assert isinstance(support, TopK)
        if support.k * len(self.teachers) >= self.vocab_size:
            everything = TopK(self.vocab_size, support.temperatures)
            return self._mean(await self._each(sequences, everything), support)
        likeliest = await self._each(sequences, support)
        named = _union([signals.ids for signals in likeliest if signals.ids is not None])
        asked = _asking(sequences, named)
        return self._mean(await self._each(asked, Requested(0, support.temperatures)), support)

    async def _each(self, sequences: list[TokenSequence], support: Support) -> list[SignalBatch]:
        return list(await asyncio.gather(*(teacher.ascore(sequences, support) for teacher in self.teachers)))

    def _mean(self, answers: list[SignalBatch], support: TopK) -> SignalBatch:
        weights = torch.tensor(self.weights)
        aligned = [_by_id(answer) for answer in answers]
        ids = aligned[0][0]
        logprobs = torch.stack([each for _, each in aligned], dim=2)
        tails = torch.stack([_column(answer, "log_tails") for answer in answers], dim=2)
        targets = torch.stack([answer.target_logprobs for answer in answers], dim=1)
        if self.combine == "probabilities":
            mean, tail, target = ((part + weights.log()).logsumexp(-1) for part in (logprobs, tails, targets))
        else:
            mean, tail, target = (_weighted(part, weights) for part in (logprobs, tails, targets))
            normaliser = torch.cat([mean, _weighted(_at_one(answers), weights)[:, None]], dim=1).logsumexp(1)
            mean, target = mean - normaliser[:, None], target - normaliser
            tail = tail - normaliser[:, None] / torch.tensor(support.temperatures)
        order = mean.argsort(dim=1, descending=True)
        return replace(
            answers[0], support=TopK(ids.shape[1], support.temperatures), ids=ids.gather(1, order),
            logprobs=mean.gather(1, order), log_tails=tail, target_logprobs=target,
        )  # fmt: skip

    def _side_by_side(self, answers: list[SignalBatch], sequences: list[TokenSequence]) -> SignalBatch:
        heads = [answer.head for answer in answers if answer.head is not None]
        if any(head.softcap is not None for head in heads):
            raise InputError("The logits of teachers with a soft-cap cannot be averaged exactly; use support 'topk'.")
        columns = min(head.vocab_size for head in heads)
        parts = list(zip(heads, self.weights, strict=True))
        biases = [head.bias[:columns].float() * head.scale * weight for head, weight in parts if head.bias is not None]
        head = Head(
            torch.cat([head.weight[:columns].float() * head.scale * weight for head, weight in parts], dim=1),
            sum(biases, torch.zeros(columns)) if biases else None,
        )
        hidden = torch.cat([_column(answer, "hidden") for answer in answers], dim=1)
        joint = replace(answers[0], hidden=hidden, head=head)
        targets = torch.from_numpy(np.concatenate([sequence.targets for sequence in sequences]).astype(np.int64))
        logprobs = [
            joint.slice_tokens(slice(start, start + 256)).logits().log_softmax(1).gather(1, part[:, None])[:, 0]
            for start, part in zip(range(0, len(targets), 256), targets.split(256), strict=True)
        ]
        return replace(joint, target_logprobs=torch.cat(logprobs)) if logprobs else joint


class Route:
    """A teacher for each row, chosen by one of the row's fields."""

    def __init__(self, settings: RouteConfig, teachers: Mapping[str, Scorer]):
        self.settings = settings
        self.teachers = teachers

    @property
    def vocab_size(self) -> int:
        return next(iter(self.teachers.values())).vocab_size

    async def ascore(
        self, batch: HasSequences | Sequence[TokenSequence], support: Support | None = None
    ) -> SignalBatch:
        """As `Teacher.ascore`: all teachers are asked at once, rows come back in order."""
        sequences = sequences_of(batch)
        rows_of: dict[str, list[int]] = {}
        for row, sequence in enumerate(sequences):
            rows_of.setdefault(name_for(sequence, self.settings), []).append(row)
        parts = await asyncio.gather(
            *(self.teachers[name].ascore([sequences[row] for row in rows], support) for name, rows in rows_of.items())
        )
        place = {row: i for i, row in enumerate(row for rows in rows_of.values() for row in rows)}
        return concatenate(parts).select([place[row] for row in range(len(sequences))])


def build_scorer(config: RunConfig, teachers: Mapping[str, Teacher]) -> Scorer | None:
    """Whom the method and the evaluation ask: the route, the ensemble, or one teacher; None where there is none.

    Raises:
        InputError: a member of the ensemble cannot answer what the ensemble will ask.
    """
    known: dict[str, Scorer] = dict(teachers)
    if config.ensemble is not None:
        names = config.ensemble.teachers or list(teachers)
        if isinstance(getattr(config.method, "support", None), TopK):
            _check_members([teachers[name] for name in names])
        weights = [config.ensemble.weights.get(name, 1.0) for name in names]
        known["ensemble"] = Ensemble([known[name] for name in names], weights, config.ensemble.combine)
    if config.route is not None:
        return Route(config.route, known)
    return known.get("ensemble") or known.get(config.evaluation_teacher)


def name_for(row: TokenSequence, route: RouteConfig) -> str:
    """The name of the teacher that a row's field (`rayk.data.Example.fields`) chooses.

    Raises:
        InputError: it chooses none, and there is no default.
    """
    value = str(getattr(row, "fields", {}).get(route.field))
    name = route.teachers.get(value, route.default)
    if name is None:
        raise InputError(
            f"{getattr(row, 'where', '') or 'A row'} has '{value}' in its field '{route.field}', which leads to no "
            "teacher; add it to route.teachers, or set route.default."
        )
    return name


def check_ensemble(support: Support, combine: str) -> None:
    """Refuse what cannot be averaged.

    Raises:
        InputError: the sentence names a support that can.
    """
    if isinstance(support, Hidden) and combine == "logits":
        return
    if not isinstance(support, TopK):
        raise InputError(
            f"An ensemble cannot take the mean of {combine} of '{support.kind}' signals; use support 'topk', or "
            "'hidden' with ensemble.combine: logits."
        )
    if combine == "probabilities" and support.temperatures != (1.0,):
        raise InputError(
            "The mean of probabilities at a temperature is not made of the teachers' tails; use temperature 1, or "
            "ensemble.combine: logits."
        )


def _check_members(teachers: Sequence[Teacher]) -> None:
    for teacher in teachers:
        if "requested" not in teacher.info.supports:
            raise InputError(
                f"Teacher '{teacher.name}' (engine kind '{teacher.info.engine}') cannot give log-probs at the tokens "
                "the others name, which an ensemble on support 'topk' asks for; use engine kind 'transformers', or "
                "support 'hidden' with ensemble.combine: logits."
            )


def _union(ids_of: list[Tensor]) -> Tensor:
    """Each position's different ids, [tokens, sum of k]; equal ones make room for others, so that none stands twice."""
    ids = torch.cat(ids_of, dim=1).sort(dim=1).values
    repeated = torch.cat([torch.zeros_like(ids[:, :1], dtype=torch.bool), ids[:, 1:] == ids[:, :-1]], dim=1)
    return fill_distinct(ids, ~repeated)


def _asking(sequences: list[TokenSequence], named: Tensor) -> list[TokenSequence]:
    counts = [sequence.counted_tokens for sequence in sequences]
    return [
        replace(sequence, requested=ids.numpy().astype(np.int32))
        for sequence, ids in zip(sequences, named.split(counts), strict=True)
    ]


def _by_id(signals: SignalBatch) -> tuple[Tensor, Tensor]:
    """Ids in rising order and their log-probs."""
    assert signals.ids is not None
    assert signals.logprobs is not None
    ids, order = signals.ids.sort(dim=1)
    return ids, signals.logprobs.gather(1, order)


def _at_one(answers: list[SignalBatch]) -> Tensor:
    """Each teacher's tail at temperature 1, [tokens, teachers]: what its own log-probs leave."""
    return torch.stack([answer.at_temperature()[1] for answer in answers], dim=1)


def _weighted(logprobs: Tensor, weights: Tensor) -> Tensor:
    """Σ w·log p over the last axis; -inf, which a weight of 0 must not turn into NaN, stays."""
    return torch.where(weights > 0, logprobs * weights, 0.0).sum(-1)


def _column(signals: SignalBatch, name: str) -> Tensor:
    column = getattr(signals, name)
    assert column is not None
    return column
