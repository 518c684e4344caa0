"""Measures of a student in `comparison`, against the teacher and against the task's truth."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayk.data.batches import collate, get_pad_id
from rayk.engines.base import SamplingParameters
from rayk.engines.generation import generate
from rayk.losses import forward_kl, reverse_kl
from rayk.models import load_model, load_tokenizer
from rayk.signals.sequence import TokenSequence
from tests.benchmarks.learning import walks

SAMPLES_A_PROMPT, DATA_ROWS = 4, 768
LENGTHS = (8, 16, 32, 48)
"""Lengths in tokens at which ExAccErr is computed."""
MAX_NEW_TOKENS = walks.MAX_WORDS + 4


@dataclass(frozen=True)
class Divergences:
    """Divergences of student q and teacher p at every counted token, nats [rows, length]; 0 after a row's end."""

    forward: Tensor
    reverse: Tensor
    entropy: Tensor
    """Entropy of the student."""
    tokens: int

    def mean(self, name: str) -> float:
        """Return the mean over tokens, nats."""
        return float(getattr(self, name).double().sum()) / self.tokens


class Measurer:
    """Measures students with the same prompts, seeds and rows, on the CPU of this process."""

    def __init__(self, teacher: Path):
        self._tokenizer = load_tokenizer(str(teacher))
        self._teacher = load_model(str(teacher))
        self._prompts = walks.all_prompts()
        rows = walks.generate_rows(DATA_ROWS, seed=0)
        self._data = [self._sequence(row["prompt"], self._ids(row["completion"] + walks.EOS)) for row in rows]
        generated = self._generate(self._teacher, self._prompts * SAMPLES_A_PROMPT)
        self._by_teacher = [self._sequence(prompt, ids) for prompt, ids in generated]

    @torch.no_grad()
    def measure(self, student: Path) -> dict[str, float]:
        """Measure the model in a folder.

        Returns:
            accuracy: share of sampled completions that are valid walks (truncated ones up to their last token).
            greedy_accuracy: the same for greedy completions, one per prompt.
            reverse_kl, forward_kl, entropy: means over the tokens of the student's own samples, nats.
            data_forward_kl: mean over new rows of the task.
            excess_error_L: ExAccErr(L) of Arora et al. 2022 (arXiv 2204.01171), as MiniLLM reports it: the KL(p‖q)
                that accumulates over L tokens of the student's text beyond that over L tokens of the teacher's text,
                as a share of the latter.
            old_town: share of visits to the old town among all visits (truth: a little over a half).
            length: mean tokens of a sample, EOS included.
            distinct_4: distinct 4-grams as a share of all 4-grams of all samples.
        """
        model = load_model(str(student))
        sampled = self._generate(model, self._prompts * SAMPLES_A_PROMPT)
        greedy = self._generate(model, self._prompts, temperature=0.0)
        own = self._divergences(model, [self._sequence(prompt, ids) for prompt, ids in sampled])
        on_teacher_text = self._divergences(model, self._by_teacher)
        texts = [self._tokenizer.convert_ids_to_tokens(ids.tolist()) for _, ids in sampled]
        visits = [word for text in texts for word in text if word in (walks.TO_OLD, walks.TO_PLAIN)]
        grams = [gram for text in texts for gram in zip(*(text[first:] for first in range(4)), strict=False)]
        return {
            "accuracy": self._share_of_walks(sampled),
            "greedy_accuracy": self._share_of_walks(greedy),
            "reverse_kl": own.mean("reverse"),
            "forward_kl": own.mean("forward"),
            "data_forward_kl": self._divergences(model, self._data).mean("forward"),
            **{
                f"excess_error_{length}": excess_error(own.forward, on_teacher_text.forward, length)
                for length in LENGTHS
            },
            "old_town": visits.count(walks.TO_OLD) / max(1, len(visits)),
            "length": statistics.mean(map(len, texts)),
            "distinct_4": len(set(grams)) / max(1, len(grams)),
            "entropy": own.mean("entropy"),
        }

    def _generate(self, model: Any, prompts: list[str], temperature: float = 1.0) -> list[tuple[str, np.ndarray]]:
        ids = [self._ids(prompt) for prompt in prompts]
        parameters = SamplingParameters(MAX_NEW_TOKENS, temperature)
        completions = generate(model, len(walks.WORDS), self._tokenizer, ids, parameters, range(len(ids)))
        return [(prompt, completion.token_ids) for prompt, completion in zip(prompts, completions, strict=True)]

    def _share_of_walks(self, completions: list[tuple[str, np.ndarray]]) -> float:
        texts = ((prompt, self._tokenizer.convert_ids_to_tokens(ids.tolist())) for prompt, ids in completions)
        return statistics.mean(walks.is_walk(prompt, words) for prompt, words in texts)

    def _divergences(self, student: Any, rows: list[TokenSequence]) -> Divergences:
        batch = collate(rows, get_pad_id(self._tokenizer))
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        log_p, log_q = (batch.counted(model(**inputs).logits).log_softmax(-1) for model in (self._teacher, student))
        counts = batch.offsets.diff().tolist()

        def in_rows(values: Tensor) -> Tensor:
            return torch.nn.utils.rnn.pad_sequence(values.split(counts), batch_first=True)

        entropy = -(log_q.exp() * log_q).sum(-1)
        forward, reverse = forward_kl(log_q, log_p), reverse_kl(log_q, log_p)
        return Divergences(in_rows(forward), in_rows(reverse), in_rows(entropy), batch.counted_tokens)

    def _ids(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer(text).input_ids, dtype=np.int32)

    def _sequence(self, prompt: str, completion: np.ndarray) -> TokenSequence:
        start = self._ids(prompt)
        ids = np.concatenate([start, completion]).astype(np.int32)
        return TokenSequence(ids, np.arange(len(ids)) >= len(start))


def excess_error(own: Tensor, reference: Tensor, length: int) -> float:
    """Return ExAccErr(l) = R(l) / (l·ε(l)) − 1 for l = `length`, and 0 if the reference is 0.

    Args:
        own: KL(p‖q) on the student's text, nats [rows, length]. R(l) is the mean over rows of the sum of l tokens.
        reference: KL(p‖q) on the teacher's text, nats [rows, length], for l·ε(l).
    """
    gathered, reference_sum = (float(kl[:, :length].double().sum(1).mean()) for kl in (own, reference))
    return gathered / reference_sum - 1 if reference_sum else 0.0
