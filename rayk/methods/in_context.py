"""In-context learning distillation: the student learns to learn from demonstrations as its teacher does (Huang et al.
2022, arXiv 2212.10670).

    L = α·hard + (1−α)·soft + β·(α·hard_text + (1−α)·soft_text)

A row is a query x with its output y after k demonstrations S_k of its task (`rayk.data.demonstrations`). Over label
words C, hard is −log P(y | x, S_k) and soft KL(P_T ‖ P)(· | x, S_k), with P and P_T restricted to C and renormalised
over it, a word of several tokens by their joint probability; over tokens both are taken at each token of y, soft over
the vocabulary. The text terms are the same two at every token that the student reads. Each term is a mean over its own
units: queries, or tokens. The paper's soft targets are cross-entropies; KL has the same gradient and is 0 at its end.

α moves from `hard_label_weight` to `final_hard_label_weight` in a straight line, β is `text_weight`. The paper's own
schedule and β are not known to us (ALGORITHMS §20).

Meta-ICT learns from many tasks and is measured on others by their demonstrations alone; Multitask-ICT learns from few
examples of the tasks it is measured on, and has the majority of several draws of demonstrations answer
(`evaluation.demonstration_draws`). Which it is, the data say.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from rayk.config import InContextConfig
from rayk.config.support import Logprob
from rayk.data.batches import Batch, collate
from rayk.data.demonstrations import Query, Shown
from rayk.data.examples import Example
from rayk.errors import UnusableSignal
from rayk.losses import label_word_loss, linear_cross_entropy, linear_divergence, sequence_sum
from rayk.methods.base import Experience, Loss, Method, Student


@dataclass(frozen=True)
class LabelWords(Experience):
    """An experience whose unit is the query: its rows are each query's options, query after query, with the teacher's
    log-probs of their tokens as `signals`."""

    queries: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.long))
    """int64 [queries + 1]; query i has the rows queries[i]:queries[i + 1]."""
    gold: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    """Which of its options is each query's output, int64 [queries]."""
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

    def select(self, queries: list[int]) -> "LabelWords":
        bounds = self.queries.tolist()
        part = super().select([row for query in queries for row in range(bounds[query], bounds[query + 1])])
        assert isinstance(part, LabelWords)
        return replace(
            part, queries=_bounds(self.queries.diff()[queries]), gold=self.gold[queries],
            hard_label_weights=self.hard_label_weights[queries],
        )  # fmt: skip

    def to(self, device: torch.device | str) -> "LabelWords":
        moved = super().to(device)
        assert isinstance(moved, LabelWords)
        return replace(
            moved, queries=self.queries.to(device), gold=self.gold.to(device),
            hard_label_weights=self.hard_label_weights.to(device),
        )  # fmt: skip


@dataclass(frozen=True)
class Text(Experience):
    """Every token of what the student reads, for the terms with β."""


class InContext(Method):
    """See the module's docstring; the settings are `rayk.config.InContextConfig`."""

    settings: InContextConfig
    kind = "in_context"
    summary = "the student learns from demonstrations in its context as the teacher does"
    paper = "Huang et al. 2022 (ICL distillation); MetaICL's layout"
    needs = (
        "logprob of every label word, 4 bytes a token; for whole texts or targets 'tokens' as logit_kd; nothing with "
        "hard labels alone"
    )

    async def sample(self, batch: Batch, seeds: Sequence[int], progress: float) -> Batch:
        """Put demonstrations before every row."""
        assert self.demonstrator is not None
        alpha = self.settings.hard_label_weight_at(progress)
        rows = zip(batch.sequences, seeds, strict=True)
        return collate(
            [self.demonstrator.query(row, seed, alpha) for row, seed in rows if isinstance(row, Example)], batch.pad_id
        )

    async def prepare(self, batch: Batch) -> Experience:
        queries = [row for row in batch.sequences if isinstance(row, Query)]
        experience: Experience
        if self.settings.targets == "label_words":
            experience = await self._of_label_words(queries, batch.pad_id)
        else:
            experience = await self._of_tokens(Experience, queries, queries, batch.pad_id)
        if not self.settings.text_weight:
            return experience
        texts = await self._of_tokens(Text, queries, [query.whole for query in queries], batch.pad_id)
        return replace(experience, beside=texts)

    async def _of_label_words(self, queries: list[Query], pad_id: int) -> LabelWords:
        answers = collate((answer for query in queries for answer in query.alternatives), pad_id)
        bounds = _bounds(torch.tensor([len(query.options) for query in queries]))
        signals = None
        if self.settings.asks_teacher:
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

    async def _of_tokens(
        self, kind: type[Experience], queries: list[Query], rows: Sequence[Shown], pad_id: int
    ) -> Experience:
        batch, signals = collate(rows, pad_id), None
        if self.settings.asks_teacher:
            assert self.teacher is not None
            signals = await self.teacher.ascore(batch, self.settings.support)
        weights = torch.tensor([query.hard_label_weight for query in queries]).repeat_interleave(batch.offsets.diff())
        return kind(batch, signals, {"hard_label_weight": weights})

    def loss(self, student: Student, experience: Experience) -> Loss:
        if isinstance(experience, LabelWords):
            return _label_word_loss(student, experience)
        if not isinstance(experience, Text):
            return _token_loss(student, experience)
        text = _token_loss(student, experience)
        terms = {f"text_{name}": term for name, term in text.terms.items() if name != "hard_label_weight"}
        return Loss(self.settings.text_weight * text.per_token, terms)


def _label_word_loss(student: Student, experience: LabelWords) -> Loss:
    batch, signals, queries = experience.batch, experience.signals, experience.queries
    # Padding of the student's embedding is no token that the teacher could have given a probability.
    head = student.head if signals is None else student.head.truncate(signals.vocab_size)
    logprobs = sequence_sum(-linear_cross_entropy(student.hidden(batch), head, batch.targets), batch.offsets)
    teacher = None if signals is None else sequence_sum(signals.target_logprobs, signals.offsets)
    hard, soft = label_word_loss(logprobs, teacher, experience.gold, queries)
    alpha = experience.hard_label_weights
    return _mixed(alpha, hard, soft)


def _token_loss(student: Student, experience: Experience) -> Loss:
    batch, alpha, hidden = experience.batch, experience.columns["hard_label_weight"], student.hidden(experience.batch)
    if experience.signals is None:
        return _mixed(alpha, linear_cross_entropy(hidden, student.head, batch.targets), None)
    soft, hard = linear_divergence(hidden, student.head, experience.signals, "forward_kl", targets=batch.targets)
    return _mixed(alpha, hard, soft)


def _mixed(alpha: Tensor, hard: Tensor, soft: Tensor | None) -> Loss:
    if soft is None:
        return Loss(hard, {"cross_entropy": hard})
    terms = {"cross_entropy": hard, "forward_kl": soft, "hard_label_weight": alpha}
    return Loss(alpha * hard + (1 - alpha) * soft, terms)


def _bounds(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
