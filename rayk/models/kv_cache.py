"""A KV cache per sequence instead of per batch: sequences of different lengths can join and leave a batch, and the last
tokens of a sequence can be removed from its cache.

A batch aligns all sequences' caches at the right, so that cached and new tokens are neighbors, as sliding-window
attention requires. The padding before them is masked, and position ids count from each sequence's start.
"""

import inspect
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rayk.models import CausalLM
from rayk.models.body import get_body, long_rope_start


@dataclass(frozen=True)
class KeyValues:
    """Keys and values of a sequence's first tokens: a pair (keys, values) per layer, each [heads, tokens, width]."""

    layers: tuple[tuple[Tensor, Tensor], ...] = ()

    def __len__(self) -> int:
        return self.layers[0][0].shape[1] if self.layers else 0

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)

    def truncate(self, tokens: int) -> "KeyValues":
        """Return the keys and values of the first `tokens` tokens, sharing memory."""
        return KeyValues(tuple((keys[:, :tokens], values[:, :tokens]) for keys, values in self.layers))

    def clone(self) -> "KeyValues":
        """Return a copy in memory of its own, because a part of a batch keeps the whole batch's memory allocated."""
        return KeyValues(tuple((keys.clone(), values.clone()) for keys, values in self.layers))


def can_continue(model: CausalLM) -> bool:
    """Return whether the model can continue a sequence from the keys and values of any number of its first tokens.
    Models with state-space layers cannot, because these keep a single state of all tokens, and neither can models whose
    rotary embeddings change with the sequence's length."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    if long_rope_start(model.config) is not None:
        return False
    layers = DynamicCache(config=model.config).layers
    takes_positions = "position_ids" in inspect.signature(get_body(model).forward).parameters
    return takes_positions and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


class CachedBatch:
    """A batch of sequences, each of which continues after its cached tokens (or from the start if none are cached)."""

    def __init__(self, model: CausalLM, pasts: list[KeyValues], room: int = 0):
        """
        Args:
            room: tokens for which memory is reserved, so that those are cached without a copy of the earlier ones; more
                tokens are possible.
        """
        from transformers.cache_utils import Cache

        from rayk.models.cache_layer import ReservedLayer

        self._model = model
        device = model.device
        self._lengths = torch.tensor([len(past) for past in pasts], device=device)
        longest = max(map(len, pasts))
        self._mask = torch.arange(longest, device=device) >= longest - self._lengths[:, None]
        self._starts = [longest - len(past) for past in pasts]
        # Without a config every layer keeps all tokens; a cache limited to a window could not be truncated.
        self._cache = Cache(layer_class_to_replicate=partial(ReservedLayer, room))
        for layer in range(max(len(past.layers) for past in pasts)):
            pairs = [past.layers[layer] if past.layers else None for past in pasts]
            keys, values = (
                _right_aligned([None if pair is None else pair[i] for pair in pairs], longest) for i in (0, 1)
            )
            self._cache.update(keys, values, layer)

    def forward(self, input_ids: Tensor, counts: Tensor | None = None) -> Tensor:
        """Return the final hidden states [rows, length, width] of the next tokens, int64 [rows, length].

        Args:
            counts: [rows], number of real tokens in each row if the remaining ones are padding; a padded batch cannot
                be continued.
        """
        steps = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        counts = torch.full_like(self._lengths, input_ids.shape[1]) if counts is None else counts
        self._mask = torch.cat([self._mask, steps < counts[:, None]], dim=1)
        positions = self._lengths[:, None] + torch.minimum(steps, counts[:, None] - 1)
        self._lengths = self._lengths + counts
        return get_body(self._model)(
            input_ids=input_ids, attention_mask=self._mask.long(), position_ids=positions,
            past_key_values=self._cache, use_cache=True,
        ).last_hidden_state  # fmt: skip

    def key_values(self) -> list[KeyValues]:
        """Return the keys and values of each sequence, sharing the batch's memory."""
        layers = [(layer.keys, layer.values) for layer in self._cache.layers]
        spans = zip(self._starts, self._lengths.tolist(), strict=True)
        return [
            KeyValues(
                tuple(
                    (keys[row, :, start : start + length], values[row, :, start : start + length])
                    for keys, values in layers
                )
            )
            for row, (start, length) in enumerate(spans)
        ]


def _right_aligned(rows: list[Tensor | None], longest: int) -> Tensor:
    """Stack rows [heads, tokens, width] to [rows, heads, longest, width], with zeros before their tokens."""
    first = next(row for row in rows if row is not None)
    aligned = first.new_zeros(len(rows), first.shape[0], longest, first.shape[2])
    for place, row in enumerate(rows):
        if row is not None:
            aligned[place, :, longest - row.shape[1] :] = row
    return aligned
