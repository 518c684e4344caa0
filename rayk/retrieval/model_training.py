"""Train the two models of a retriever on scored candidates (LLM-R, arXiv 2307.07164, §3.2 and §3.3).

The reward model is a cross-encoder s(x, y, d) of query x with its right answer y and a candidate d, trained by

    −log softmax s(x, y, d⁺)  over d⁺, one of the best candidates, and some of the worst.

The bi-encoder E ranks candidates by the cosine of E(x) and E(d), without y. It is trained by `rayk.losses.retrieval`,
where the rewards of candidates are s(x, y, d), or the teacher's scores.

Both are transformers models, trained by one loop (`_fit`). The trainer of sentence-transformers would need more code,
because it supports neither two losses on one batch nor the exclusion of negatives by label and row.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rayk.config import EncoderTraining, RetrieverConfig, RewardModelConfig
from rayk.data.nearest import Embedder, EncoderSettings, load_encoder
from rayk.errors import RunFailed
from rayk.losses import full_contrastive_loss, no_negatives, reward_distillation
from rayk.models import max_positions
from rayk.retrieval.teacher_scores import REFUSED, Progress

ENCODER_SETTING, REWARD_SETTING = (
    f"method.demonstrations.retriever.{name}" for name in ("encoder", "reward_model.model")
)
_REWARD_BATCH_PAIRS = 64
_MAX_GRAD_NORM = 1.0


@dataclass(frozen=True, eq=False)
class RetrieverTexts:
    """The texts that the models read, and numbers that are equal for texts with the same input or label.

    Attributes:
        queries: the input of each query.
        answers: the right output of each query, with the separator before it.
        passages: the rows of the pool as demonstrations.
        query_rows: int64 [queries]; numbers equal here or in `passage_rows` mean the same input of the same task.
        passage_rows: int64 [passages].
        query_labels: int64 [queries]; numbers equal here or in `passage_labels` mean the same label of the same task;
            -1 means no label.
        passage_labels: int64 [passages].
    """

    queries: list[str]
    answers: list[str]
    passages: list[str]
    query_rows: np.ndarray
    passage_rows: np.ndarray
    query_labels: np.ndarray
    passage_labels: np.ndarray


@dataclass(frozen=True, eq=False)
class ScoredCandidates:
    """A query with scored candidates.

    Attributes:
        query: index in `RetrieverTexts.queries`.
        candidates: int64 [candidates], indices in `RetrieverTexts.passages`.
        scores: float32 [candidates].
    """

    query: int
    candidates: np.ndarray
    scores: np.ndarray

    def split_best_and_worst(self, positives: int, worst: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of the `positives` best candidates and of the `worst` worst other ones; both are empty if
        fewer than `positives` candidates are useful or no other one remains."""
        order = np.argsort(-self.scores, kind="stable")
        if len(order) <= positives or self.scores[order[positives - 1]] <= REFUSED:
            return order[:0], order[:0]
        return order[:positives], order[max(positives, len(order) - worst) :]


@dataclass(frozen=True)
class ComputeSettings:
    """Seed, precision and threads of a process that trains or runs a model."""

    seed: int
    precision: str = "float32"
    threads: int | None = None
    """Number of CPU threads; 0 means one per core of the machine, None leaves it unchanged."""

    def set_up(self) -> str:
        """Apply the settings to this process and return the device."""
        if self.threads is not None:
            torch.set_num_threads(self.threads or os.cpu_count() or 1)
        return "cuda" if torch.cuda.is_available() else "cpu"


class RewardModel:
    """A cross-encoder, which scores a pair of a query with its right answer and a passage.

    Raises:
        InputError: the model cannot be loaded.
    """

    def __init__(self, model: str, settings: RewardModelConfig):
        from transformers import AutoModelForSequenceClassification

        self._tokenizer, self.model = load_encoder(
            model, AutoModelForSequenceClassification, REWARD_SETTING, num_labels=1
        )
        self.model.config.pad_token_id = self._tokenizer.pad_token_id
        self._max_tokens = min(settings.max_tokens, max_positions(self.model.config))

    def scores(self, texts: RetrieverTexts, pairs: list[tuple[int, int]]) -> Tensor:
        """Return the score of each pair (query, passage), [pairs]."""
        inputs = self._tokenizer(
            [texts.queries[query] + texts.answers[query] for query, _ in pairs],
            [texts.passages[passage] for _, passage in pairs],
            return_tensors="pt", padding=True, truncation=True, max_length=self._max_tokens,
            return_token_type_ids=False,
        ).to(self.model.device)  # fmt: skip
        return self.model(**inputs).logits[:, 0]

    def save(self, folder: Path) -> None:
        """Write the model for `RewardModel(folder)`."""
        self.model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)


def fit_reward_model(
    settings: RetrieverConfig, texts: RetrieverTexts, scored: list[ScoredCandidates], folder: Path,
    compute: ComputeSettings, progress: Progress = lambda done, total, text: None,
) -> float:  # fmt: skip
    """Train the reward model on the teacher's scores, write it to `folder`, and return its final loss.

    Raises:
        InputError: the model cannot be loaded.
        RunFailed: the loss diverged, or no query can be trained on.
    """
    model_settings = settings.reward_model
    assert model_settings is not None
    rows = [_TrainingRow(query, *query.split_best_and_worst(settings.positives, settings.worst)) for query in scored]

    def loss(reward: RewardModel, batch: list[_TrainingRow], random: np.random.Generator) -> Tensor:
        pairs = []
        for row in batch:
            chosen = row.draw(model_settings.negatives, random)
            pairs += [(row.query.query, row.query.candidates[index]) for index in chosen]
        scores = reward.scores(texts, pairs).view(len(batch), -1)
        return F.cross_entropy(scores, scores.new_zeros(len(batch), dtype=torch.long))

    return _fit(lambda: RewardModel(model_settings.model, model_settings), model_settings, rows, loss,
                np.random.default_rng([compute.seed, 1]), folder, compute, progress)  # fmt: skip


def fit_encoder(
    settings: RetrieverConfig, texts: RetrieverTexts, scored: list[ScoredCandidates], folder: Path,
    compute: ComputeSettings, progress: Progress = lambda done, total, text: None,
) -> float:  # fmt: skip
    """Train the bi-encoder on candidates' rewards, write it to `folder`, and return its final loss.

    Raises:
        InputError: the model cannot be loaded.
        RunFailed: the loss diverged, or no query can be trained on.
    """
    rows = [_TrainingRow(query, *_split_other_labels(query, settings, texts)) for query in scored]

    def loss(embedder: Embedder, batch: list[_TrainingRow], random: np.random.Generator) -> Tensor:
        chosen = np.array([row.draw(settings.passages - 1, random) for row in batch])
        queries = np.array([row.query.query for row in batch])
        passages = np.stack([row.query.candidates[indices] for row, indices in zip(batch, chosen, strict=True)])
        rewards = np.stack([row.query.scores[indices] for row, indices in zip(batch, chosen, strict=True)])
        vectors = embedder.encode(
            [texts.queries[query] for query in queries] + [texts.passages[passage] for passage in passages.flat]
        )
        query_vectors, passage_vectors = vectors[: len(batch)], vectors[len(batch) :].view(*passages.shape, -1)
        rewards_tensor = torch.from_numpy(rewards).to(vectors.device)
        distillation = reward_distillation(query_vectors, passage_vectors, rewards_tensor, settings.temperature)
        groups = (
            texts.query_rows[queries], texts.query_labels[queries], texts.passage_rows[passages],
            texts.passage_labels[passages],
        )  # fmt: skip
        excluded = no_negatives(*map(torch.from_numpy, groups)).to(vectors.device)
        contrastive = full_contrastive_loss(query_vectors, passage_vectors, settings.temperature, excluded)
        return (distillation + settings.contrastive_weight * contrastive).mean()

    encoder_settings = EncoderSettings(settings.max_tokens, settings.prompt, outputs=True)
    return _fit(lambda: Embedder(settings.encoder, encoder_settings, ENCODER_SETTING), settings, rows, loss,
                np.random.default_rng([compute.seed, 2]), folder, compute, progress)  # fmt: skip


def compute_rewards(
    settings: RewardModelConfig, texts: RetrieverTexts, scored: list[ScoredCandidates], folder: Path,
    compute: ComputeSettings, progress: Progress = lambda done, total, text: None,
) -> list[np.ndarray]:  # fmt: skip
    """Return the rewards of the model in `folder` for all candidates: float32 [candidates] for each query."""
    reward = RewardModel(str(folder), settings)
    reward.model.to(compute.set_up())
    pairs = [(query.query, passage) for query in scored for passage in query.candidates]
    with torch.inference_mode(), _autocast(compute.precision, reward.model.device.type):
        parts = []
        for start in range(0, len(pairs), _REWARD_BATCH_PAIRS):
            parts.append(reward.scores(texts, pairs[start : start + _REWARD_BATCH_PAIRS]).float().cpu())
            progress(start + len(parts[-1]), len(pairs), "")
    return np.split(torch.cat(parts).numpy(), np.cumsum([len(query.candidates) for query in scored])[:-1])


@dataclass(frozen=True, eq=False)
class _TrainingRow:
    """A query with the indices of its best and worst candidates."""

    query: ScoredCandidates
    best: np.ndarray
    worst: np.ndarray

    def draw(self, negatives: int, random: np.random.Generator) -> list[int]:
        """Return the index of one of the best candidates, then of `negatives` of the worst; if there are fewer, they
        repeat."""
        return [random.choice(self.best), *np.resize(random.permutation(self.worst), negatives)]


def _split_other_labels(
    query: ScoredCandidates, settings: RetrieverConfig, texts: RetrieverTexts
) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the best candidates, and of the worst ones without those that have the query's label."""
    best, worst = query.split_best_and_worst(settings.positives, settings.worst)
    label = texts.query_labels[query.query]
    return best, worst[(texts.passage_labels[query.candidates[worst]] != label) | (label < 0)]


class _Trainable(Protocol):
    model: Any

    def save(self, folder: Path) -> None: ...


M = TypeVar("M", bound=_Trainable)


def _fit(
    load: Callable[[], M], settings: EncoderTraining, rows: list[_TrainingRow],
    loss_of: Callable[[M, list[_TrainingRow], np.random.Generator], Tensor], random: np.random.Generator, folder: Path,
    compute: ComputeSettings, progress: Progress,
) -> float:  # fmt: skip
    """Train a model on batches of `rows`, write it to `folder`, and return the mean loss of the last tenth of steps.

    Training is deterministic: torch's global generator is seeded here, and `random` by the caller.
    """
    device = compute.set_up()
    rows = [row for row in rows if len(row.worst)]
    with torch.random.fork_rng():
        torch.manual_seed(compute.seed)
        trained = load()
        trained.model.to(device)
        losses = _train(trained.model, settings, rows, lambda batch: loss_of(trained, batch, random), random, compute,
                        progress)  # fmt: skip
    trained.save(folder)
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def _train(
    model: Any, settings: EncoderTraining, rows: list[_TrainingRow], loss_of: Callable[[list[_TrainingRow]], Tensor],
    random: np.random.Generator, compute: ComputeSettings, progress: Progress,
) -> list[float]:  # fmt: skip
    """Run all optimizer steps and return the loss of each."""
    from transformers import get_linear_schedule_with_warmup

    if not rows:
        raise RunFailed(
            "No training row has candidates both good and bad enough to train a retriever on; give more rows of each "
            "task, or set method.demonstrations.choice to 'bm25'."
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("position_embeddings" not in name)  # frozen in the paper's code
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], settings.learning_rate
    )
    schedule = get_linear_schedule_with_warmup(optimizer, settings.warmup_steps, settings.steps)
    model.train()
    losses = []
    for step, batch in enumerate(_batches(rows, settings, random), start=1):
        with _autocast(compute.precision, model.device.type):
            loss = loss_of(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise RunFailed(
                f"The retriever's loss is {losses[-1]} at step {step}; lower method.demonstrations.retriever's "
                "learning_rate, or its reward_model's."
            )
        progress(step, settings.steps, f"loss {losses[-1]:.3f}")
    model.eval()
    return losses


def _batches(
    rows: list[_TrainingRow], settings: EncoderTraining, random: np.random.Generator
) -> Iterator[list[_TrainingRow]]:
    """Yield one batch of different rows per step, in a new random order for each pass over the rows."""
    size, order = min(settings.batch_size, len(rows)), np.zeros(0, np.int64)
    for _ in range(settings.steps):
        if len(order) < size:
            order = random.permutation(len(rows))
        yield [rows[index] for index in order[:size]]
        order = order[size:]


def _autocast(precision: str, device: str) -> torch.autocast:
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")
