"""How good a student is: its loss, its distance to the teacher on the data's tokens, and its answers to the prompts.

Every number is a sum over tokens or answers divided once at the end, so shares measured by different workers merge
exactly.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rayk.config import EvaluationConfig
from rayk.config.support import Logprob, TopK
from rayk.data.batches import Batch, collate, micro_batches, pad_id_of
from rayk.data.demonstrations import DemonstrationPool
from rayk.data.examples import Example
from rayk.data.views import RowViews
from rayk.engines.base import SamplingParameters
from rayk.engines.generation import generate
from rayk.evaluation.answers import Answer, AnswerScorer
from rayk.evaluation.options import answer_by_options, with_options
from rayk.losses import linear_cross_entropy, linear_divergence, linear_log_probs, sequence_sum
from rayk.models import Head, real_vocab_size
from rayk.serving.event_loop import run_in_background, stream_in_background, wait_for
from rayk.signals.batch import SignalBatch
from rayk.teachers import Ensemble, Scorer, Teacher

_ARGMAX_CHUNK_ELEMENTS = 1 << 23


@dataclass
class Evaluation:
    """Sums over what was measured, and some of the answers."""

    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    answers: list[Answer] = field(default_factory=list)

    def add(self, **sums: float) -> None:
        """Count what was measured further."""
        for name, value in sums.items():
            self.sums[name] += value

    @property
    def metrics(self) -> dict[str, float]:
        """Means: nats a token for losses and divergences, nats a pair for margins, shares for the rest."""
        means = {}
        for name, (total, count) in _MEANS.items():
            if self.sums[count]:
                means[name] = self.sums[total] / self.sums[count]
        return means

    @staticmethod
    def merge(parts: Iterable["Evaluation | None"]) -> "Evaluation":
        """The evaluation of all parts' rows together; answers in the order of the parts."""
        whole = Evaluation()
        for part in parts:
            if part is not None:
                whole.add(**part.sums)
                whole.answers.extend(part.answers)
        return whole


# metric: (sum, divided by)
_MEANS = {
    "loss": ("cross_entropy", "tokens"),
    "forward_kl": ("forward_kl", "signal_tokens"),
    "reverse_kl": ("reverse_kl", "signal_tokens"),
    "agreement": ("agreement", "signal_tokens"),
    "teacher_entropy": ("teacher_entropy", "signal_tokens"),
    "teacher_mass": ("teacher_mass", "signal_tokens"),
    "student_mass": ("student_mass", "signal_tokens"),
    "accuracy": ("correct", "answers"),
    "answer_tokens": ("answer_tokens", "answers"),
    "stopped": ("stopped", "answers"),
    "preference_margin": ("preference_margin", "pairs"),
    "preference_accuracy": ("preferred", "pairs"),
}


class Evaluator:
    """Measures a student on one rank's share of fixed rows. The teacher is asked once; its signals are kept for the
    next time."""

    def __init__(
        self, settings: EvaluationConfig, examples: Iterable[Example], tokenizer, teacher: Scorer | None,
        micro_batch_tokens: int, rank: int = 0, world: int = 1, views: RowViews | None = None,
    ):  # fmt: skip
        every = list(examples)
        self._settings = settings
        self._views = views or RowViews()
        self._examples = [self._views.apply_draw(row) for row in every[rank::world]]
        self._with_options = with_options(every, views)[rank::world]
        # Numbered before they are shared out: an answer's seed is its number, whoever asks.
        self._asked = list(enumerate(with_prompts(every, settings, views)))[rank::world]
        self._tokenizer = tokenizer
        self._teacher = teacher
        self._budget = micro_batch_tokens
        self._signals: list[SignalBatch | None] = []

    @torch.no_grad()
    def run(self, student, answers: bool) -> Evaluation:
        """Measure `student` (`.hidden(batch)`, `.head`, `.model`), also its answers to the prompts if asked and set."""
        batches = list(self._batches(self._examples))
        if not self._signals:
            self._signals = self._ask(batches)
        parts = [
            measure(student, batch.to(student.model.device), signals)
            for batch, signals in zip(batches, self._signals, strict=True)
        ]
        parts += [measure_preferences(student, pairs.to(student.model.device)) for pairs in self._pairs()]
        if answers and self._settings.generation:
            parts.append(self._answers(student.model))
        if answers and self._with_options:
            parts.append(self._chosen(student))
        return Evaluation.merge(parts)

    def _ask(self, batches: list[Batch]) -> list[SignalBatch | None]:
        if self._teacher is None:
            return [None] * len(batches)
        return list(_asked(self._teacher, batches, self._settings.support))

    def _answers(self, model) -> Evaluation:
        settings = self._settings.generation
        assert settings is not None
        # After demonstrations a model goes on to the next one, where it writes no end token.
        pool = self._views.demonstrations
        separator = "" if pool is None else pool.settings.separator
        stop = (separator,) if separator else ()
        parameters = SamplingParameters(settings.max_new_tokens, settings.temperature, stop=stop)
        scorer = AnswerScorer(self._settings, self._tokenizer)
        evaluation = Evaluation()
        vocab_size = real_vocab_size(self._tokenizer)
        asked = [(number, shown) for number, row in self._asked for shown in self._drawn(row)]
        answers: dict[int, list[Answer]] = {}
        for rows in micro_batches([shown.prompt_tokens + settings.max_new_tokens for _, shown in asked], self._budget):
            seeds, examples = zip(*(asked[row] for row in rows), strict=True)
            prompts = [example.prompt_ids for example in examples]
            completions = generate(model, vocab_size, self._tokenizer, prompts, parameters, seeds)
            for number, example, written in zip(seeds, examples, completions, strict=True):
                text = scorer.text_of(written.token_ids).removesuffix(separator)
                answer = scorer.score(example, text, written.finish_reason, len(written.token_ids))
                answers.setdefault(number, []).append(answer)
        for of_row in answers.values():
            add_answer(evaluation, of_row[scorer.majority([answer.text for answer in of_row])])
        return evaluation

    def _drawn(self, row: Example) -> Sequence[Example]:
        """What the student is asked about `row`: after each draw of demonstrations, where there are any."""
        if self._views.demonstrations is None:
            return [row]
        return [self._views.apply_draw(row, draw) for draw in range(self._settings.demonstration_draws)]

    def _chosen(self, student) -> Evaluation:
        """Answers to the rows with options."""
        assert self._views.demonstrations is not None
        evaluation = Evaluation()

        def log_probs(rows: list[Example]) -> list[float]:
            found: dict[int, float] = {}
            for group in micro_batches([len(row) for row in rows], self._budget):
                batch = collate([rows[row] for row in group], pad_id_of(self._tokenizer)).to(student.model.device)
                per_token = -linear_cross_entropy(student.hidden(batch), student.head, batch.targets)
                found |= zip(group, sequence_sum(per_token.double(), batch.offsets).tolist(), strict=True)
            return [found[row] for row in range(len(rows))]

        scorer, draws = AnswerScorer(self._settings, self._tokenizer), self._settings.demonstration_draws
        for answer in answer_by_options(self._with_options, self._views.demonstrations, draws, scorer, log_probs):
            add_answer(evaluation, answer)
        return evaluation

    def _pairs(self) -> Iterator[Batch]:
        pairs = [example.answers for example in self._examples if example.rejected is not None]
        for group in micro_batches([2 * max(map(len, pair)) for pair in pairs], self._budget):
            yield collate([answer for pair in group for answer in pairs[pair]], pad_id_of(self._tokenizer))

    def _batches(self, examples: Sequence[Example]) -> Iterator[Batch]:
        for rows in micro_batches([len(example) for example in examples], self._budget):
            yield collate([examples[row] for row in rows], pad_id_of(self._tokenizer))


def measure(student, batch: Batch, signals: SignalBatch | None) -> Evaluation:
    """Sums of losses and divergences over one batch."""
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


def measure_preferences(student, batch: Batch) -> Evaluation:
    """How far the student itself, held against no reference, prefers the chosen answers (rows 2i) to the rejected ones
    (rows 2i + 1): sums of log q(chosen) − log q(rejected) over whole answers, and how often it is above 0."""
    per_token = -linear_cross_entropy(student.hidden(batch), student.head, batch.targets)
    logprobs = sequence_sum(per_token.double(), batch.offsets)
    margin = logprobs[0::2] - logprobs[1::2]
    evaluation = Evaluation()
    preferred = 0.5 * (margin.sign() + 1)
    evaluation.add(pairs=len(margin), preference_margin=float(margin.sum()), preferred=float(preferred.sum()))
    return evaluation


def evaluate_teacher(
    teacher: Scorer, settings: EvaluationConfig, examples: Sequence[Example], tokenizer, batch_tokens: int = 8192,
    views: RowViews | None = None,
) -> Evaluation:  # fmt: skip
    """The teacher's own loss and answers, for comparison; asked through its service. Several teachers as one have a
    loss, but no answers of their own; nor has one after demonstrations, but to rows with options."""
    views = views or RowViews()
    options, examples = with_options(examples, views), [views.apply_draw(row) for row in examples]
    rows_of = micro_batches([len(example) for example in examples], batch_tokens)
    batches = [collate([examples[row] for row in rows], pad_id_of(tokenizer)) for rows in rows_of]
    evaluation = Evaluation()
    # A teacher that reads rows as the student does.
    plain = teacher if isinstance(teacher, Teacher) and not views.has_view(teacher.settings.name) else None
    support = settings.support if plain is None else Logprob()
    for batch, signals in zip(batches, _asked(teacher, batches, support), strict=True):
        evaluation.add(tokens=batch.counted_tokens, cross_entropy=-float(signals.target_logprobs.sum()))
    if settings.generation and plain is not None:
        asked = with_prompts(examples, settings)
        scorer = AnswerScorer(settings, tokenizer)
        completions = plain.generate(
            [example.prompt_ids for example in asked],
            max_new_tokens=settings.generation.max_new_tokens,
            temperature=settings.generation.temperature,
        )
        for example, written in zip(asked, completions, strict=True):
            add_answer(evaluation, scorer.score(example, written.text, written.finish_reason, len(written.token_ids)))
    if views.demonstrations is not None and options and not isinstance(teacher, Ensemble):
        for answer in _options_of_teacher(teacher, settings, options, tokenizer, views.demonstrations):
            add_answer(evaluation, answer)
    return evaluation


def _options_of_teacher(
    teacher: Scorer, settings: EvaluationConfig, rows: list[Example], tokenizer, pool: DemonstrationPool
) -> Iterator[Answer]:
    def log_probs(answers: list[Example]) -> list[float]:
        signals = wait_for(run_in_background(teacher.ascore(answers, Logprob())))
        return sequence_sum(signals.target_logprobs.double(), signals.offsets).tolist()

    scorer = AnswerScorer(settings, tokenizer)
    return answer_by_options(rows, pool, settings.demonstration_draws, scorer, log_probs)


def with_prompts(
    examples: Iterable[Example], settings: EvaluationConfig, views: RowViews | None = None
) -> list[Example]:
    """The rows whose prompts are to be answered by writing."""
    if settings.generation is None:
        return []
    pool = views and views.demonstrations
    written = (row for row in examples if pool is None or not pool.option_ids(row))
    return [example for example in written if example.prompt_tokens][: settings.generation.rows]


def add_answer(evaluation: Evaluation, answer: Answer) -> None:
    """Count one answer and keep it."""
    evaluation.answers.append(answer)
    evaluation.add(
        answers=1, correct=answer.correct, answer_tokens=answer.tokens, stopped=answer.finish_reason == "stop"
    )


def fitting(support: TopK | Logprob, vocab_size: int) -> TopK | Logprob:
    """`support` with k no larger than the vocabulary: for measuring, all of a small one will do."""
    if isinstance(support, TopK) and support.k > vocab_size:
        return TopK(vocab_size, support.temperatures)
    return support


def _asked(teacher: Scorer, batches: Iterable[Batch], support: TopK | Logprob) -> Iterator[SignalBatch]:
    support = fitting(support, teacher.vocab_size)
    return stream_in_background((teacher.ascore(batch, support) for batch in batches), prefetch=4)


def _top_tokens(hidden: Tensor, head: Head) -> Tensor:
    chunk = max(1, _ARGMAX_CHUNK_ELEMENTS // head.vocab_size)
    return torch.cat([head.logits(part).argmax(1) for part in hidden.split(chunk)])
