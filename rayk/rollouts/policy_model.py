"""The student's model as policies use it: generate completions and read log-probs, a batch at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayk.data.batches import Batch, collate, get_pad_id
from rayk.engines.base import GeneratedSequence, SamplingParameters
from rayk.engines.generation import generate
from rayk.losses import linear_cross_entropy
from rayk.models import DTYPES, CausalLM, final_hidden, get_head, real_vocab_size
from rayk.models.ends import end_token_ids
from rayk.signals.sequence import TokenSequence

_CHUNK_ELEMENTS = 1 << 23


class PolicyModel:
    """A model that generates and computes log-probs with the numerics of a training step.

    Call its methods inside `inference_context`, on the same thread.
    """

    def __init__(
        self, model: CausalLM, tokenizer: Any, precision: str = "float32", vocab_size: int | None = None
    ):  # fmt: skip
        """
        Args:
            precision: dtype of matrix products.
            vocab_size: number of leading ids that completions may contain; None: all real tokens.
        """
        self.model = model
        tokens = min(get_head(model).vocab_size, real_vocab_size(tokenizer))
        self.vocab_size = tokens if vocab_size is None else min(tokens, vocab_size)
        self._tokenizer = tokenizer
        self._compute_dtype = DTYPES[precision]

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that end a completion."""
        return end_token_ids(self.model.generation_config, self._tokenizer)

    def generate(
        self, prompts: Sequence[np.ndarray], parameters: SamplingParameters, seeds: Sequence[int],
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> list[GeneratedSequence]:  # fmt: skip
        """Return one completion per prompt (token ids); stop early once `is_cancelled()` is true."""
        return generate(self.model, self.vocab_size, self._tokenizer, prompts, parameters, seeds, is_cancelled)

    def top_ids(self, sequences: Sequence[TokenSequence], k: int) -> list[np.ndarray]:
        """Return the most likely ids at the counted tokens, int32 [counted tokens, k]; see `rayk.rollouts.Policy`."""

        def most_likely(hidden: Tensor, _: Batch) -> Tensor:
            head = get_head(self.model)
            chunks = hidden.split(max(1, _CHUNK_ELEMENTS // head.vocab_size))
            count = min(k, self.vocab_size)
            return torch.cat(
                [head.logits(chunk)[:, : self.vocab_size].topk(count, dim=1).indices for chunk in chunks]
            ).int()

        return self._per_sequence(sequences, most_likely)

    def logprobs(self, sequences: Sequence[TokenSequence]) -> list[np.ndarray]:
        """Return log q of the counted tokens, float32 [counted tokens]; see `rayk.rollouts.Policy`."""

        def target_logprobs(hidden: Tensor, batch: Batch) -> Tensor:
            return -linear_cross_entropy(hidden, get_head(self.model).truncate(self.vocab_size), batch.targets)

        return self._per_sequence(sequences, target_logprobs)

    @contextmanager
    def inference_context(self) -> Iterator[None]:
        """Disable dropout and gradients and use the training step's dtype, on the current thread."""
        # Not inference mode: buffers created in a forward could not be used in a later step's backward.
        with self.eval_mode(), torch.no_grad(), self.autocast():
            yield

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        """Disable dropout; restore the mode of each of the model's modules at the end."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training

    def autocast(self) -> AbstractContextManager[Any]:
        """Use the training step's dtype for matrix products, on the current thread."""
        return torch.autocast(self.model.device.type, self._compute_dtype, self._compute_dtype != torch.float32)

    def _per_sequence(
        self, sequences: Sequence[TokenSequence], read: Callable[[Tensor, Batch], Tensor]
    ) -> list[np.ndarray]:
        """Apply `read` to the hidden states at the counted tokens; return [counted tokens, ...] per sequence."""
        batch = collate(sequences, get_pad_id(self._tokenizer)).to(self.model.device)
        hidden = batch.counted(final_hidden(self.model, batch.input_ids, batch.attention_mask))
        values = read(hidden.to(self._compute_dtype), batch).cpu().numpy()
        return np.split(values, batch.offsets[1:-1].tolist())
