"""Draws from categorical distributions by inversion of uniform numbers."""

import torch
from torch import Tensor
from torch.nn import functional as F

_BLOCK = 256
"""Ids of a block."""


def draw_ids(weights: Tensor, numbers: Tensor) -> Tensor:
    """Draw ids, int64 [rows, n], in proportion to `weights` [rows, vocab]; ids of weight 0 are never drawn.

    A block of ids is drawn, then an id of the block, because cumulative sums over the whole vocabulary take long.

    Args:
        numbers: float64 [rows, n], uniform in [0, 1).
    """
    blocks = F.pad(weights, (0, -weights.shape[1] % _BLOCK)).unflatten(1, (-1, _BLOCK))
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(1)
    # In float64 the product stays below the last cumulative value, so the index is that of a possible block.
    coins = numbers * ends[:, -1:]
    block = torch.searchsorted(ends, coins, right=True).clamp(max=ends.shape[1] - 1)
    coins = coins - F.pad(ends, (1, 0)).gather(1, block)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK)).cumsum(2, dtype=torch.float64)
    last = inside[:, :, -1]
    coins = torch.minimum(coins, last.nextafter(torch.zeros_like(last)))
    place = torch.searchsorted(inside, coins[:, :, None], right=True)[:, :, 0]
    return (block * _BLOCK + place).clamp(max=weights.shape[1] - 1)
