"""The sizes of the checks on a GPU and on a CPU, and helpers that several checks share."""

import gc
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rayk.data.batches import Batch, collate
from rayk.models.packing import enable_packing
from rayk.signals.sequence import TokenSequence


class Skip(Exception):
    """The check needs something that this machine does not have."""


@dataclass(frozen=True)
class Scale:
    """Sizes of models and batches."""

    device: str
    width: int
    layers: int
    vocab_size: int
    tokens: int
    """Positions of the losses."""

    @classmethod
    def of(cls, device: str) -> "Scale":
        return cls("cuda", 1024, 8, 128_256, 8192) if device == "cuda" else cls("cpu", 32, 2, 384, 256)

    @property
    def is_gpu(self) -> bool:
        return self.device == "cuda"

    def model(self, attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0):
        """Return a Llama with random weights and a sharply peaked head."""
        config = AutoConfig.for_model(
            "llama", vocab_size=self.vocab_size, hidden_size=self.width, intermediate_size=2 * self.width,
            num_hidden_layers=self.layers, num_attention_heads=8 if self.is_gpu else 4, num_key_value_heads=2,
            max_position_embeddings=4096, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1, bos_token_id=2,
        )  # fmt: skip
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
        with torch.no_grad():
            model.get_output_embeddings().weight.normal_(std=2 * self.width**-0.5)
        model = model.to(self.device, dtype)
        enable_packing(model)
        return model

    def batch(self, lengths: tuple[int, ...] = (33, 120, 64, 7), seed: int = 0) -> Batch:
        """Return rows of random tokens, of which the second half counts."""
        random = np.random.default_rng(seed)
        rows = [
            TokenSequence(
                random.integers(4, self.vocab_size, length).astype(np.int32), np.arange(length) >= length // 2
            )
            for length in lengths
        ]
        return collate(rows, 0).to(self.device)


def peak_bytes(work) -> int:
    """Return the bytes of GPU memory that `work` allocates at most, above what is allocated before."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest expected value."""
    expected = expected.double()
    return float((found.double() - expected).abs().max() / expected.abs().max())


def ensure(value: float, limit: float, what: str) -> str:
    """Return a figure; raise AssertionError if it is not below its limit."""
    if not value <= limit:
        raise AssertionError(f"{what} is {value:.3g}, above {limit:g}")
    return f"{what} {value:.2g}"
