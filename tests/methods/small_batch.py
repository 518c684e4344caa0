"""A batch of three rows, and the dense logits of a model at its counted tokens."""

import torch
from torch import Tensor

from rayk.data.batches import Batch, collate
from rayk.signals.sequence import TokenSequence

VOCABULARY = 384


def small_batch() -> Batch:
    """Return rows of different lengths, whose tokens from the third on are counted."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (5, 12, 9):
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).int().numpy()
        rows.append(TokenSequence(ids, torch.arange(length).numpy() >= 2))
    return collate(rows, pad_id=0)


def dense_logits(model: torch.nn.Module, batch: Batch) -> Tensor:
    """Return the logits that predict the counted tokens, [tokens, vocab]."""
    return batch.counted(model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits)
