"""The student's model as one that writes, a batch at a time, wherever it stands."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayk.data.batches import Batch, collate, pad_id_of
from rayk.engines.base import GeneratedSequence, SamplingParameters
from rayk.engines.transformers import generate, get_eos_token_ids
from rayk.losses import linear_cross_entropy
from rayk.models import DTYPES, CausalLM, final_hidden, get_head, real_vocab_size
from rayk.signals.sequence import TokenSequence

_CHUNK_ELEMENTS = 1 << 23


class PolicyModel:
    """Generates with a model and reads what it says of sequences, computing as a training step does.

    What it computes must run inside `computing`, on the same thread.
    """

    def __init__(self, model: CausalLM, tokenizer: Any, precision: str = "float32"):
        """
        Args:
            precision: what the products run in.
        """
        self.model = model
        self.vocab_size = min(get_head(model).vocab_size, real_vocab_size(tokenizer))
        self._tokenizer = tokenizer
        self._compute_dtype = DTYPES[precision]

    @property
    def ends(self) -> list[int]:
        """The tokens that end a completion."""
        return get_eos_token_ids(self.model, self._tokenizer)

    def generate(
        self, prompts: Sequence[np.ndarray], parameters: SamplingParameters, seeds: Sequence[int],
        abandoned: Callable[[], bool] = lambda: False,
    ) -> list[GeneratedSequence]:  # fmt: skip
        """One continuation a prompt (token ids); cut off once `abandoned`."""
        return generate(self.model, self.vocab_size, self._tokenizer, prompts, parameters, seeds, abandoned)

    def top_ids(self, sequences: Sequence[TokenSequence], k: int) -> list[np.ndarray]:
        """The likeliest ids at the counted positions, int32 [counted tokens, k]; see `rayk.rollouts.Policy`."""

        def likeliest(hidden: Tensor, _: Batch) -> Tensor:
            head = get_head(self.model)
            parts = hidden.split(max(1, _CHUNK_ELEMENTS // head.vocab_size))
            kept = min(k, self.vocab_size)
            return torch.cat(
                [head.logits(part)[:, : self.vocab_size].topk(kept, dim=1).indices for part in parts]
            ).int()

        return self._per_sequence(sequences, likeliest)

    def logprobs(self, sequences: Sequence[TokenSequence]) -> list[np.ndarray]:
        """log q of the counted tokens, float32 [counted tokens]; see `rayk.rollouts.Policy`."""

        def of_targets(hidden: Tensor, batch: Batch) -> Tensor:
            return -linear_cross_entropy(hidden, get_head(self.model).truncate(self.vocab_size), batch.targets)

        return self._per_sequence(sequences, of_targets)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Without dropout and gradients, products as in training; holds for the thread it is entered on."""
        # Not inference mode: buffers that a forward makes would be of no use to the backward of a later step.
        with self.evaluating(), torch.no_grad(), self.autocast():
            yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Without dropout; a model that learns goes on learning afterwards."""
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)

    def autocast(self) -> AbstractContextManager[Any]:
        """Products as in training; holds for the thread it is entered on."""
        return torch.autocast(self.model.device.type, self._compute_dtype, self._compute_dtype != torch.float32)

    def _per_sequence(
        self, sequences: Sequence[TokenSequence], read: Callable[[Tensor, Batch], Tensor]
    ) -> list[np.ndarray]:
        """What `read` makes of the hidden states at each sequence's counted positions, [counted tokens, ...] each."""
        batch = collate(sequences, pad_id_of(self._tokenizer)).to(self.model.device)
        hidden = batch.counted(final_hidden(self.model, batch.input_ids, batch.attention_mask))
        values = read(hidden.to(self._compute_dtype), batch).cpu().numpy()
        return np.split(values, batch.offsets[1:-1].tolist())
