"""In-context learning distillation: the student learns in-context learning from its teacher (Huang et al. 2022, arXiv
2212.10670).

    L = α·hard + (1−α)·soft + β·(α·hard_text + (1−α)·soft_text)

A row is a query x with its output y after k demonstrations S_k of its task (`rayk.data.demonstrations`). With targets
`label_words` over label words C, hard is −log P(y | x, S_k) and soft is KL(P_T ‖ P)(· | x, S_k), where P and P_T are
restricted to C and renormalized; a word of several tokens has their joint probability. With targets `tokens`, both are
taken at each token of y, soft over the vocabulary. The text terms are the same two losses at every token that the
student reads. Each term is a mean over its units, queries or tokens. The paper's soft targets are cross-entropies; KL
has the same gradient and a minimum of 0.

α changes linearly from `hard_label_weight` to `final_hard_label_weight`, and β is `text_weight`. The paper states
neither its schedule nor its β.

The paper's Meta-ICT trains on many tasks and evaluates on other tasks, which the student sees in demonstrations only.
Its Multitask-ICT trains on few examples of the evaluated tasks, and answers by the majority over several draws of
demonstrations (`evaluation.demonstration_draws`). A run does one or the other depending on its data.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from rayk.config import InContextConfig
from rayk.config.support import Logprob
from rayk.data.batches import Batch, collate
from rayk.data.demonstrations import DemonstratedRow
from rayk.data.examples import Example
from rayk.errors import UnusableSignal
from rayk.losses import label_word_loss, linear_cross_entropy, linear_divergence, sequence_sum
from rayk.methods.base import Experience, Loss, Method, Student


@dataclass(frozen=True)
class LabelWords(Experience):
    """An experience whose unit is the query: the rows are the options of the queries, query after query, with the
    teacher's log-probs of their tokens as `signals`."""

    queries: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.long))
    """int64 [queries + 1]; query i has the rows queries[i]:queries[i + 1]."""
    gold: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    """The index of the right option of each query, int64 [queries]."""
    hard_label_weights: Tensor = field(default_factory=lambda: torch.zeros(0))
    """α, [queries]."""

    @property
    def count(self) -> int:
        return len(self.gold)

    @property
    def lengths(self) -> list[int]:
        rows = [len(sequence) for sequence in self.batch.sequences]
        bounds = self.queries.tolist()
        return [(end - first) * max(rows[first:end]) for first, end in pairwise(bounds)]

    def select(self, queries: list[int]) -> Self:
        bounds = self.queries.tolist()
        part = super().select([row for query in queries for row in range(bounds[query], bounds[query + 1])])
        return replace(
            part, queries=_bounds(self.queries.diff()[queries]), gold=self.gold[queries],
            hard_label_weights=self.hard_label_weights[queries],
        )  # fmt: skip

    def to(self, device: torch.device | str) -> Self:
        return replace(
            super().to(device), queries=self.queries.to(device), gold=self.gold.to(device),
            hard_label_weights=self.hard_label_weights.to(device),
        )  # fmt: skip


@dataclass(frozen=True)
class FullText(Experience):
    """Every token that the student reads, for the terms with weight β."""


class InContext(Method):
    """ICL distillation; see the module's docstring. Settings: `rayk.config.InContextConfig`."""

    settings: InContextConfig
    kind = "in_context"
    summary = "the student learns in-context learning from the teacher"
    paper = "Huang et al. 2022 (ICL distillation); MetaICL's layout"
    needs = (
        "logprob of every label word: 4 bytes a token; for whole texts or targets 'tokens' as logit_kd; none with hard "
        "labels alone"
    )

    async def prepare(self, batch: Batch) -> Experience:
        queries = [row for row in batch.sequences if isinstance(row, DemonstratedRow)]
        experience: Experience
        if self.settings.targets == "label_words":
            experience = await self._prepare_label_words(queries, batch.pad_id)
        else:
            experience = await self._prepare_tokens(Experience, queries, queries, batch.pad_id)
        if not self.settings.text_weight:
            return experience
        texts = await self._prepare_tokens(FullText, queries, [query.full_text for query in queries], batch.pad_id)
        return replace(experience, auxiliary=texts)

    async def _prepare_label_words(self, queries: list[DemonstratedRow], pad_id: int) -> LabelWords:
        answers = collate((answer for query in queries for answer in query.alternatives), pad_id)
        bounds = _bounds(torch.tensor([len(query.options) for query in queries]))
        signals = None
        if self.settings.queries_teacher:
            assert self.teacher is not None
            try:
                signals = await self.teacher.ascore(answers, Logprob())
            except UnusableSignal as error:
                unusable = torch.searchsorted(bounds, torch.tensor(error.rows), right=True) - 1
                raise UnusableSignal(str(error), sorted(set(unusable.tolist()))) from error
        return LabelWords(
            answers, signals, queries=bounds, gold=torch.tensor([query.gold for query in queries]),
            hard_label_weights=torch.tensor([query.hard_label_weight for query in queries]),
        )  # fmt: skip

    async def _prepare_tokens(
        self, kind: type[Experience], queries: list[DemonstratedRow], rows: Sequence[Example], pad_id: int
    ) -> Experience:
        batch, signals = collate(rows, pad_id), None
        if self.settings.queries_teacher:
            assert self.teacher is not None
            signals = await self.teacher.ascore(batch, self.settings.support)
        weights = torch.tensor([query.hard_label_weight for query in queries]).repeat_interleave(batch.offsets.diff())
        return kind(batch, signals, {"hard_label_weight": weights})

    def loss(self, student: Student, experience: Experience) -> Loss:
        if isinstance(experience, LabelWords):
            return _label_word_loss(student, experience)
        if not isinstance(experience, FullText):
            return _token_loss(student, experience)
        text = _token_loss(student, experience)
        terms = {f"text_{name}": term for name, term in text.terms.items() if name != "hard_label_weight"}
        return Loss(self.settings.text_weight * text.per_token, terms)


def _label_word_loss(student: Student, experience: LabelWords) -> Loss:
    batch, signals, queries = experience.batch, experience.signals, experience.queries
    # The teacher has no probability for padding columns of the student's embedding.
    head = student.head if signals is None else student.head.truncate(signals.vocab_size)
    logprobs = sequence_sum(-linear_cross_entropy(student.hidden(batch), head, batch.targets), batch.offsets)
    teacher = None if signals is None else sequence_sum(signals.target_logprobs, signals.offsets)
    hard, soft = label_word_loss(logprobs, teacher, experience.gold, queries)
    return _mix(experience.hard_label_weights, hard, soft)


def _token_loss(student: Student, experience: Experience) -> Loss:
    batch, alpha, hidden = experience.batch, experience.columns["hard_label_weight"], student.hidden(experience.batch)
    if experience.signals is None:
        return _mix(alpha, linear_cross_entropy(hidden, student.head, batch.targets), None)
    soft, hard = linear_divergence(hidden, student.head, experience.signals, "forward_kl", targets=batch.targets)
    return _mix(alpha, hard, soft)


def _mix(alpha: Tensor, hard: Tensor, soft: Tensor | None) -> Loss:
    if soft is None:
        return Loss(hard, {"cross_entropy": hard})
    terms = {"cross_entropy": hard, "forward_kl": soft, "hard_label_weight": alpha}
    return Loss(alpha * hard + (1 - alpha) * soft, terms)


def _bounds(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
