"""Seeded sampling: the same tokens for the same seed, in any batch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayk.engines.base import SamplingParameters
from rayk.engines.drawing import draw_ids


class SeededSampler:
    """Samples each row's next token with the row's own random stream.

    A row's samples depend on its seed and the step only, not on the other rows of its batch.
    """

    def __init__(self, parameters: SamplingParameters, seeds: Sequence[int], vocab_size: int):
        """
        Args:
            vocab_size: the number of real tokens; the embedding's padding after them is never sampled.
        """
        from transformers import TopKLogitsWarper, TopPLogitsWarper

        self._temperature = parameters.temperature
        self._vocab_size = vocab_size
        self._streams = [np.random.Generator(np.random.Philox(seed)) for seed in seeds]
        self._warpers: list[Any] = []
        if parameters.top_k:
            self._warpers.append(TopKLogitsWarper(parameters.top_k))
        if parameters.top_p < 1:
            self._warpers.append(TopPLogitsWarper(parameters.top_p))

    def sample(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Sample a token per row from logits [rows, vocab].

        Returns:
            ids, int64 [rows], and their log-probs at temperature 1, float32 [rows]. The embedding's padding counts in
            the normalizer, as in `reduce_logits`.
        """
        logits = logits.float()
        largest = logits.amax(-1, keepdim=True)
        weights = (logits - largest).exp_()
        normalizer = largest + weights.sum(-1, keepdim=True).log()
        real = logits[:, : self._vocab_size]
        if self._temperature == 0:
            chosen = real.argmax(-1, keepdim=True)
        else:
            numbers = torch.tensor([[stream.random()] for stream in self._streams], dtype=torch.float64)
            chosen = draw_ids(self._truncated(real, weights[:, : self._vocab_size]), numbers.to(logits.device))
        return chosen[:, 0], (real.gather(1, chosen) - normalizer)[:, 0]

    def keep(self, rows: Sequence[int]) -> None:
        """Continue with these rows only, which are numbered anew in this order."""
        self._streams = [self._streams[row] for row in rows]

    def _truncated(self, logits: Tensor, weights: Tensor) -> Tensor:
        """Return the weights [rows, vocab] of the tokens to draw from, proportional to their probabilities.

        Args:
            weights: those at temperature 1 without truncation.
        """
        if self._temperature == 1 and not self._warpers:
            return weights
        logits = logits / self._temperature
        for warper in self._warpers:
            logits = warper(None, logits)
        return (logits - logits.amax(-1, keepdim=True)).exp_()
