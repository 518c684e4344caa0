"""Training a retriever's two models on scored candidates (LLM-R, arXiv 2307.07164, §3.2 and §3.3).

The reward model is a cross-encoder s(x, y, d) of query x with its right answer y and a candidate d, trained by

    −log softmax s(x, y, d⁺)  over d⁺, one of the best candidates, and some of the worst;

the bi-encoder E, whose cosine of E(x) and E(d) must do without y, by `rayk.losses.retrieval`, where candidates' rewards
are s(x, y, d), or the teacher's scores. Plain transformers models and a plain loop: sentence-transformers has neither
the two terms over one batch nor negatives that are left out by label and row.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rayk.config import EncoderTraining, RetrieverConfig, RewardModelConfig
from rayk.data.nearest import Embedder, EncoderSettings, load_encoder
from rayk.errors import RunFailed
from rayk.losses import full_contrastive_loss, no_negatives, reward_distillation
from rayk.models import max_positions
from rayk.retrieval.scores import REFUSED, Progress

ENCODER_SETTING, REWARD_SETTING = (
    f"method.demonstrations.retriever.{name}" for name in ("encoder", "reward_model.model")
)
_PAIRS_AT_ONCE = 64
_MAX_GRAD_NORM = 1.0


@dataclass(frozen=True, eq=False)
class Texts:
    """What the models read, and which of it is the same.

    Attributes:
        queries: each query's input.
        answers: each query's right output, as it stands behind its input.
        passages: the rows of the pool as demonstrations.
        query_rows: int64 [queries]; with `passage_rows`, equal numbers are the same input of the same task.
        query_labels: int64 [queries]; with `passage_labels`, equal numbers are the same label of the same task, -1 is
            none.
    """

    queries: list[str]
    answers: list[str]
    passages: list[str]
    query_rows: np.ndarray
    passage_rows: np.ndarray
    query_labels: np.ndarray
    passage_labels: np.ndarray


@dataclass(frozen=True, eq=False)
class Graded:
    """A query and how good its candidates are.

    Attributes:
        query: its place in `Texts.queries`.
        candidates: int64 [candidates], places in `Texts.passages`.
        scores: float32 [candidates].
    """

    query: int
    candidates: np.ndarray
    scores: np.ndarray

    def parted(self, positives: int, worst: int) -> tuple[np.ndarray, np.ndarray]:
        """The places of the best candidates and of the worst others; none where too few are of any use."""
        order = np.argsort(-self.scores, kind="stable")
        if len(order) <= positives or self.scores[order[positives - 1]] <= REFUSED:
            return order[:0], order[:0]
        return order[:positives], order[max(positives, len(order) - worst) :]


@dataclass(frozen=True)
class Workshop:
    """Where and how models are trained, whatever they learn."""

    seed: int
    precision: str = "float32"
    threads: int | None = None
    """CPU threads; 0: as many as the machine has cores, None: as they are set."""

    def enter(self) -> str:
        """Set this process up; the device."""
        if self.threads is not None:
            torch.set_num_threads(self.threads or os.cpu_count() or 1)
        return "cuda" if torch.cuda.is_available() else "cpu"


def fit_reward_model(
    settings: RetrieverConfig, texts: Texts, graded: list[Graded], folder: Path, workshop: Workshop,
    progress: Progress = lambda done, total, text: None,
) -> float:  # fmt: skip
    """Train the reward model on the teacher's scores, into `folder`.

    Returns:
        Its loss at the end.

    Raises:
        InputError: the model cannot be loaded.
        RunFailed: it diverged.
    """
    own = settings.reward_model
    assert own is not None
    device = workshop.enter()
    parted = [(each, *each.parted(settings.positives, settings.worst)) for each in graded]
    parted = [each for each in parted if len(each[2])]
    random = np.random.default_rng([workshop.seed, 1])
    with torch.random.fork_rng():
        torch.manual_seed(workshop.seed)
        reward = RewardModel(own.model, own)
        reward.model.to(device)

        def loss(batch: list[Any]) -> Tensor:
            pairs = []
            for query, best, worst in batch:
                chosen = [random.choice(best), *_drawn(worst, own.negatives, random)]
                pairs += [(query.query, query.candidates[place]) for place in chosen]
            scores = reward.scores(texts, pairs).view(len(batch), -1)
            return F.cross_entropy(scores, scores.new_zeros(len(batch), dtype=torch.long))

        last = _trained(reward.model, own, parted, loss, random, workshop, progress)
    reward.save(folder)
    return last


def rewarded(
    settings: RewardModelConfig, texts: Texts, graded: list[Graded], folder: Path, workshop: Workshop,
    progress: Progress = lambda done, total, text: None,
) -> list[np.ndarray]:  # fmt: skip
    """What the reward model in `folder` gives to each candidate, float32 [candidates] a query."""
    reward = RewardModel(str(folder), settings)
    reward.model.to(workshop.enter())
    pairs = [(each.query, place) for each in graded for place in each.candidates]
    with torch.inference_mode(), _computing(workshop.precision, reward.model.device.type):
        parts = []
        for start in range(0, len(pairs), _PAIRS_AT_ONCE):
            parts.append(reward.scores(texts, pairs[start : start + _PAIRS_AT_ONCE]).float().cpu())
            progress(start + len(parts[-1]), len(pairs), "")
    return np.split(torch.cat(parts).numpy(), np.cumsum([len(each.candidates) for each in graded])[:-1])


class RewardModel:
    """A cross-encoder.

    Raises:
        InputError: the model cannot be loaded.
    """

    def __init__(self, model: str, settings: RewardModelConfig):
        from transformers import AutoModelForSequenceClassification

        self._tokenizer, self.model = load_encoder(
            model, AutoModelForSequenceClassification, REWARD_SETTING, num_labels=1
        )
        self.model.config.pad_token_id = self._tokenizer.pad_token_id
        self._longest = min(settings.max_tokens, max_positions(self.model.config))

    def scores(self, texts: Texts, pairs: list[tuple[int, int]]) -> Tensor:
        """How good each candidate is for its query, [pairs]."""
        given = self._tokenizer(
            [texts.queries[query] + texts.answers[query] for query, _ in pairs],
            [texts.passages[place] for _, place in pairs],
            return_tensors="pt", padding=True, truncation=True, max_length=self._longest, return_token_type_ids=False,
        ).to(self.model.device)  # fmt: skip
        return self.model(**given).logits[:, 0]

    def save(self, folder: Path) -> None:
        """Write it for `RewardModel(folder)`."""
        self.model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)


def fit_encoder(
    settings: RetrieverConfig, texts: Texts, graded: list[Graded], folder: Path, workshop: Workshop,
    progress: Progress = lambda done, total, text: None,
) -> float:  # fmt: skip
    """Train the bi-encoder on candidates' rewards, into `folder`.

    Returns:
        Its loss at the end.

    Raises:
        InputError: the model cannot be loaded.
        RunFailed: it diverged, or there is nothing to compare.
    """
    device = workshop.enter()
    parted = [(each, *_of_other_labels(each, settings, texts)) for each in graded]
    parted = [each for each in parted if len(each[2])]
    random = np.random.default_rng([workshop.seed, 2])
    with torch.random.fork_rng():
        torch.manual_seed(workshop.seed)
        reading = EncoderSettings(settings.max_tokens, settings.prompt, outputs=True)
        embedder = Embedder(settings.encoder, reading, ENCODER_SETTING)
        embedder.model.to(device)

        def loss(batch: list[Any]) -> Tensor:
            chosen = np.array(
                [[random.choice(best), *_drawn(worst, settings.passages - 1, random)] for _, best, worst in batch]
            )
            queries = np.array([query.query for query, _, _ in batch])
            passages = np.stack([query.candidates[own] for (query, _, _), own in zip(batch, chosen, strict=True)])
            rewards = np.stack([query.scores[own] for (query, _, _), own in zip(batch, chosen, strict=True)])
            vectors = embedder.encode(
                [texts.queries[place] for place in queries] + [texts.passages[place] for place in passages.flat]
            )
            of_queries, of_passages = vectors[: len(batch)], vectors[len(batch) :].view(*passages.shape, -1)
            distilled = reward_distillation(
                of_queries, of_passages, torch.from_numpy(rewards).to(device), settings.temperature
            )
            excluded = no_negatives(
                *(torch.from_numpy(each) for each in (
                    texts.query_rows[queries], texts.query_labels[queries], texts.passage_rows[passages],
                    texts.passage_labels[passages],
                ))
            )  # fmt: skip
            contrastive = full_contrastive_loss(of_queries, of_passages, settings.temperature, excluded.to(device))
            return (distilled + settings.contrastive_weight * contrastive).mean()

        last = _trained(embedder.model, settings, parted, loss, random, workshop, progress)
    embedder.save(folder)
    return last


def _of_other_labels(graded: Graded, settings: RetrieverConfig, texts: Texts) -> tuple[np.ndarray, np.ndarray]:
    """The best candidates, and the worst without those of the query's label."""
    best, worst = graded.parted(settings.positives, settings.worst)
    label = texts.query_labels[graded.query]
    return best, worst[(texts.passage_labels[graded.candidates[worst]] != label) | (label < 0)]


def _drawn(places: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """So many of `places`, each as often as any other where they are fewer."""
    return np.resize(random.permutation(places), count)


def _trained(
    model: Any, settings: EncoderTraining, rows: list[Any], loss_of: Callable[[list[Any]], Tensor],
    random: np.random.Generator, workshop: Workshop, progress: Progress,
) -> float:  # fmt: skip
    """Train `model` on batches of `rows`; the mean loss over the last tenth of the steps."""
    from transformers import get_linear_schedule_with_warmup

    if not rows:
        raise RunFailed(
            "No training row has candidates both good and bad enough to learn a retriever from; give more rows of each "
            "task, or set method.demonstrations.choice to 'bm25'."
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("position_embeddings" not in name)  # frozen in the paper's code
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], settings.learning_rate)
    schedule = get_linear_schedule_with_warmup(optimizer, settings.warmup_steps, settings.steps)
    model.train()
    losses = []
    for step, batch in enumerate(_batches(rows, settings, random), start=1):
        with _computing(workshop.precision, model.device.type):
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
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def _batches(rows: list[Any], settings: EncoderTraining, random: np.random.Generator) -> Iterator[list[Any]]:
    """A batch a step, of different rows, pass after pass."""
    size, order = min(settings.batch_size, len(rows)), np.zeros(0, np.int64)
    for _ in range(settings.steps):
        if len(order) < size:
            order = random.permutation(len(rows))
        yield [rows[place] for place in order[:size]]
        order = order[size:]


def _computing(precision: str, device: str) -> torch.autocast:
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")
