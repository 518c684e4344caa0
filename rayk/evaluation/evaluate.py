"""Evaluate a student on held-out rows: its loss, its divergence from the teacher, and its answers to the prompts.

Every metric is a sum over tokens or answers, divided once at the end, so that the result of several workers is exactly
that of one.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayk.config import EvaluationConfig
from rayk.config.support import Logprob, TopK
from rayk.data.batches import Batch, collate, get_pad_id, micro_batches
from rayk.data.demonstrations import DemonstrationPool
from rayk.data.examples import Example
from rayk.data.views import RowViews
from rayk.engines.base import SamplingParameters
from rayk.engines.generation import generate
from rayk.evaluation.answer_scoring import Answer, AnswerScorer
from rayk.evaluation.metrics import MEAN_METRICS
from rayk.evaluation.option_ranking import answer_with_options, select_option_rows
from rayk.losses import linear_cross_entropy, linear_divergence, linear_log_probs, sequence_sum
from rayk.models import Head, real_vocab_size
from rayk.serving.event_loop import run_in_background, stream_in_background, wait_for
from rayk.signals.batch import SignalBatch
from rayk.signals.sequence import TokenSequence
from rayk.teachers import Ensemble, Scorer, Teacher

_ARGMAX_CHUNK_ELEMENTS = 1 << 23
_ANSWER_METRIC = "answer metric "
"""Prefix of the sums of `evaluation.metrics`."""


@dataclass
class Evaluation:
    """Sums over the evaluated rows, and the answers."""

    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    answers: list[Answer] = field(default_factory=list)

    def add(self, **sums: float) -> None:
        """Add the values to the sums with these names."""
        for name, value in sums.items():
            self.sums[name] += value

    def add_answer(self, answer: Answer) -> None:
        """Append an answer and add its scores to the sums."""
        self.answers.append(answer)
        self.add(answers=1, answer_tokens=answer.tokens, stopped=answer.finish_reason == "stop")
        if answer.correct is not None:
            self.add(judged=1, correct=answer.correct)
        self.add(**{_ANSWER_METRIC + name: value for name, value in answer.metrics.items()})

    @property
    def metrics(self) -> dict[str, float]:
        """Means by name: nats per token for losses and divergences, nats per pair for margins, shares for the rest."""
        means = {}
        for name, (total, count) in MEAN_METRICS.items():
            if self.sums[count]:
                means[name] = self.sums[total] / self.sums[count]
        for name in [name for name in self.sums if name.startswith(_ANSWER_METRIC)]:
            means[name.removeprefix(_ANSWER_METRIC)] = self.sums[name] / self.sums["answers"]
        return means

    @staticmethod
    def merge(parts: Iterable["Evaluation | None"]) -> "Evaluation":
        """Return the evaluation of the rows of all parts; answers in the order of the parts."""
        merged = Evaluation()
        for part in parts:
            if part is not None:
                merged.add(**part.sums)
                merged.answers.extend(part.answers)
        return merged


class Evaluator:
    """Evaluate a student on one rank's share of fixed rows. The teacher's signals are requested once and reused."""

    def __init__(
        self, settings: EvaluationConfig, examples: Iterable[Example], tokenizer: Any, teacher: Scorer | None,
        micro_batch_tokens: int, rank: int = 0, world: int = 1, views: RowViews | None = None,
    ):  # fmt: skip
        all_examples = list(examples)
        self._settings = settings
        self._views = views or RowViews()
        self._examples = [self._views.apply_draw(row) for row in all_examples[rank::world]]
        self._option_rows = select_option_rows(all_examples, views)[rank::world]
        # Numbered before they are divided among ranks: the number is the seed of the answer, which therefore does not
        # depend on the number of ranks.
        self._generation_rows = list(enumerate(select_generation_rows(all_examples, settings, views)))[rank::world]
        self._tokenizer = tokenizer
        self._teacher = teacher
        self._budget = micro_batch_tokens
        self._signals: list[SignalBatch | None] = []

    @torch.no_grad()
    def run(self, student: Any, answers: bool) -> Evaluation:
        """Evaluate `student` (which has `.hidden(batch)`, `.head`, `.model` and `.autocast()`).

        Args:
            answers: also answer the prompts: by generation if `evaluation.generation` is set, and rows with options by
                the likeliest one.
        """
        batches = list(self._batches(self._examples))
        if not self._signals:
            self._signals = self._request_signals(batches)
        parts = [
            measure_batch(student, batch.to(student.model.device), signals)
            for batch, signals in zip(batches, self._signals, strict=True)
        ]
        parts += [measure_preferences(student, pairs.to(student.model.device)) for pairs in self._pairs()]
        if answers and self._settings.generation:
            with student.autocast():
                parts.append(self._generate_answers(student.model))
        if answers and self._option_rows:
            parts.append(self._choose_options(student))
        return Evaluation.merge(parts)

    def _request_signals(self, batches: list[Batch]) -> list[SignalBatch | None]:
        if self._teacher is None:
            return [None] * len(batches)
        return list(_stream_signals(self._teacher, batches, self._settings.support))

    def _generate_answers(self, model: Any) -> Evaluation:
        settings = self._settings.generation
        assert settings is not None
        # After demonstrations a model continues with the next demonstration instead of an end token.
        pool = self._views.demonstrations
        separator = "" if pool is None else pool.settings.separator
        stop = (separator,) if separator else ()
        parameters = SamplingParameters(settings.max_new_tokens, settings.temperature, stop=stop)
        scorer = AnswerScorer(self._settings, self._tokenizer)
        evaluation = Evaluation()
        vocab_size = real_vocab_size(self._tokenizer)
        requests = [
            (number + (sample << 32), view)  # the seed depends on neither the batch nor the rank
            for number, row in self._generation_rows
            for sample in range(settings.samples)
            for view in self._draws(row)
        ]
        answers: dict[int, list[Answer]] = {}
        lengths = [view.prompt_tokens + settings.max_new_tokens for _, view in requests]
        for group in micro_batches(lengths, self._budget):
            seeds, examples = zip(*(requests[index] for index in group), strict=True)
            prompts = [example.prompt_ids for example in examples]
            completions = generate(model, vocab_size, self._tokenizer, prompts, parameters, seeds)
            for seed, example, completion in zip(seeds, examples, completions, strict=True):
                text = scorer.decode(completion.token_ids).removesuffix(separator)
                answer = scorer.score(example, text, completion.finish_reason, len(completion.token_ids))
                answers.setdefault(seed, []).append(answer)
        for votes in answers.values():
            evaluation.add_answer(votes[scorer.majority_index([answer.text for answer in votes])])
        return evaluation

    def _draws(self, row: Example) -> Sequence[Example]:
        """Return `row` with the demonstrations of each draw, or unchanged in a run without demonstrations."""
        if self._views.demonstrations is None:
            return [row]
        return [self._views.apply_draw(row, draw) for draw in range(self._settings.demonstration_draws)]

    def _choose_options(self, student: Any) -> Evaluation:
        """Answer the rows with options by the likeliest option."""
        assert self._views.demonstrations is not None
        evaluation = Evaluation()

        def log_probs(rows: list[Example]) -> list[float]:
            found: dict[int, float] = {}
            for group in micro_batches([len(row) for row in rows], self._budget):
                batch = collate([rows[row] for row in group], get_pad_id(self._tokenizer)).to(student.model.device)
                per_token = -linear_cross_entropy(student.hidden(batch), student.head, batch.targets)
                found |= zip(group, sequence_sum(per_token.double(), batch.offsets).tolist(), strict=True)
            return [found[row] for row in range(len(rows))]

        scorer, draws = AnswerScorer(self._settings, self._tokenizer), self._settings.demonstration_draws
        for answer in answer_with_options(self._option_rows, self._views.demonstrations, draws, scorer, log_probs):
            evaluation.add_answer(answer)
        return evaluation

    def _pairs(self) -> Iterator[Batch]:
        pairs = [example.answers for example in self._examples if example.rejected is not None]
        for group in micro_batches([2 * max(map(len, pair)) for pair in pairs], self._budget):
            yield collate([answer for pair in group for answer in pairs[pair]], get_pad_id(self._tokenizer))

    def _batches(self, examples: Sequence[Example]) -> Iterator[Batch]:
        for rows in micro_batches([len(example) for example in examples], self._budget):
            yield collate([examples[row] for row in rows], get_pad_id(self._tokenizer))


def measure_batch(student: Any, batch: Batch, signals: SignalBatch | None) -> Evaluation:
    """Return the sums of the loss and, with a teacher's signals, of divergences over one batch."""
    hidden, head = student.hidden(batch), student.head
    evaluation = Evaluation()
    evaluation.add(tokens=batch.counted_tokens)
    if signals is None:
        evaluation.add(cross_entropy=float(linear_cross_entropy(hidden, head, batch.targets).double().sum()))
        return evaluation
    signals = signals.to(hidden.device)
    assert signals.ids is not None
    forward, cross_entropy = linear_divergence(hidden, head, signals, "forward_kl", targets=batch.targets)
    log_p, log_tail = signals.at_temperature()
    log_q, _, _ = linear_log_probs(hidden, head, signals.ids)
    values = {
        "signal_tokens": torch.ones_like(forward),
        "cross_entropy": cross_entropy,
        "forward_kl": forward,
        "reverse_kl": linear_divergence(hidden, head, signals, "reverse_kl"),
        "agreement": (_top_tokens(hidden, head) == signals.ids[:, 0]).float(),
        "teacher_entropy": -torch.xlogy(log_p.exp(), log_p.exp()).sum(1) - torch.xlogy(log_tail.exp(), log_tail.exp()),
        "teacher_mass": log_p.exp().sum(1),
        "student_mass": log_q.exp().sum(1),
    }
    evaluation.add(**{name: float(value.double().sum()) for name, value in values.items()})
    return evaluation


def measure_preferences(student: Any, batch: Batch) -> Evaluation:
    """Return the sum of the margin log q(chosen) − log q(rejected) over pairs of whole answers, and the number of pairs
    with a positive margin (0 counts as half). No reference model is used.

    Args:
        batch: chosen answers in rows 2i, rejected ones in rows 2i + 1.
    """
    per_token = -linear_cross_entropy(student.hidden(batch), student.head, batch.targets)
    logprobs = sequence_sum(per_token.double(), batch.offsets)
    margin = logprobs[0::2] - logprobs[1::2]
    evaluation = Evaluation()
    preferred = 0.5 * (margin.sign() + 1)
    evaluation.add(pairs=len(margin), preference_margin=float(margin.sum()), preferred=float(preferred.sum()))
    return evaluation


def evaluate_teacher(
    teacher: Scorer, settings: EvaluationConfig, examples: Sequence[Example], tokenizer: Any, batch_tokens: int = 8192,
    views: RowViews | None = None,
) -> Evaluation:  # fmt: skip
    """Evaluate the served teacher's own loss and answers, for comparison with the student's.

    Only a single teacher that reads no demonstrations generates answers, after its own prompt; an ensemble, a route or
    any other teacher has a loss only. Rows with options are answered by any teacher but an ensemble.
    """
    views = views or RowViews()
    option_rows, examples = select_option_rows(examples, views), [views.apply_draw(row) for row in examples]
    groups = micro_batches([len(example) for example in examples], batch_tokens)
    batches = [collate([examples[row] for row in group], get_pad_id(tokenizer)) for group in groups]
    evaluation = Evaluation()
    single = teacher if isinstance(teacher, Teacher) and views.reads_prompts(teacher.settings.name) else None
    support = settings.support if single is None else Logprob()
    for batch, signals in zip(batches, _stream_signals(teacher, batches, support), strict=True):
        evaluation.add(tokens=batch.counted_tokens, cross_entropy=-float(signals.target_logprobs.sum()))
    if settings.generation and single is not None:
        rows = select_generation_rows(examples, settings)
        scorer = AnswerScorer(settings, tokenizer)
        rows = [row for row in rows for _ in range(settings.generation.samples)]
        completions = single.generate(
            [_prompt_ids(row.view(single.settings.name)) for row in rows],
            max_new_tokens=settings.generation.max_new_tokens,
            temperature=settings.generation.temperature,
        )
        for row, completion in zip(rows, completions, strict=True):
            evaluation.add_answer(
                scorer.score(row, completion.text, completion.finish_reason, len(completion.token_ids))
            )
    if views.demonstrations is not None and option_rows and not isinstance(teacher, Ensemble):
        for answer in _teacher_options(teacher, settings, option_rows, tokenizer, views.demonstrations):
            evaluation.add_answer(answer)
    return evaluation


def _prompt_ids(view: TokenSequence) -> np.ndarray:
    assert isinstance(view, Example)
    return view.prompt_ids


def _teacher_options(
    teacher: Scorer, settings: EvaluationConfig, rows: list[Example], tokenizer: Any, pool: DemonstrationPool
) -> Iterator[Answer]:
    def log_probs(answers: list[Example]) -> list[float]:
        signals = wait_for(run_in_background(teacher.ascore(answers, Logprob())))
        return sequence_sum(signals.target_logprobs.double(), signals.offsets).tolist()

    scorer = AnswerScorer(settings, tokenizer)
    return answer_with_options(rows, pool, settings.demonstration_draws, scorer, log_probs)


def select_generation_rows(
    examples: Iterable[Example], settings: EvaluationConfig, views: RowViews | None = None
) -> list[Example]:
    """Return the rows that are answered by generation: rows with a prompt and without options."""
    if settings.generation is None:
        return []
    pool = None if views is None else views.demonstrations
    candidates = (row for row in examples if pool is None or not pool.option_ids(row))
    return [example for example in candidates if example.prompt_tokens][: settings.generation.rows]


def limit_support(support: TopK | Logprob, vocab_size: int) -> TopK | Logprob:
    """Return `support` with k at most the vocabulary size, so that the default k also works for a small vocabulary."""
    if isinstance(support, TopK) and support.k > vocab_size:
        return TopK(vocab_size, support.temperatures)
    return support


def _stream_signals(teacher: Scorer, batches: Iterable[Batch], support: TopK | Logprob) -> Iterator[SignalBatch]:
    support = limit_support(support, teacher.vocab_size)
    return stream_in_background((teacher.ascore(batch, support) for batch in batches), prefetch=4)


def _top_tokens(hidden: Tensor, head: Head) -> Tensor:
    chunk = max(1, _ARGMAX_CHUNK_ELEMENTS // head.vocab_size)
    return torch.cat([head.logits(part).argmax(1) for part in hidden.split(chunk)])
