"""The states of layers in a signal: 8 bits a number with a scale for each block, and their columns in the wire format.

A state has a few numbers that are hundreds of times larger than the others, so one scale for all would round these to
0. Here 32 neighboring numbers share a scale s = max|x| / 127, rounded to bfloat16, and x is stored as round(x / s). The
error of a number is below 0.4 % of the largest one in its block.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rayk.config.support import STATE_BLOCK, LayerPart, Layers
from rayk.models.types import DTYPES

_LEVELS = 127
_PARTS: tuple[LayerPart, ...] = ("output", "attention")
_PART_UNIT = 1 << 32
_MOST_LAYERS, _WIDEST = 1 << 16, 1 << 24
_DTYPES: tuple[Literal["int8", "float16", "bfloat16", "float32"], ...] = ("int8", "float16", "bfloat16", "float32")
_FINAL_DTYPES: tuple[Literal["float16", "bfloat16", "float32"] | None, ...] = (None, "float16", "bfloat16", "float32")


def compress_states(states: Tensor, dtype: str) -> tuple[Tensor, Tensor | None]:
    """Return states [..., width] in `dtype`, and for `int8` the scales of their blocks, bfloat16 [..., blocks]; else
    None. A block with NaN or inf has such a scale."""
    if dtype != "int8":
        return states.to(DTYPES[dtype]), None
    width = states.shape[-1]
    blocks = F.pad(states.float(), (0, -width % STATE_BLOCK)).unflatten(-1, (-1, STATE_BLOCK))
    scales = (blocks.abs().amax(-1) / _LEVELS).bfloat16()
    levels = (blocks / scales.float()[..., None]).nan_to_num().round().clamp(-_LEVELS, _LEVELS)
    return levels.to(torch.int8).flatten(-2)[..., :width], scales


def expand_states(states: Tensor, scales: Tensor | None) -> Tensor:
    """Return what `compress_states` stored, float32 [..., width]."""
    if scales is None:
        return states.float()
    return states.float() * scales.float().repeat_interleave(STATE_BLOCK, dim=-1)[..., : states.shape[-1]]


@dataclass(frozen=True)
class LayerColumns:
    """The columns of a `layers` signal in the wire format.

    Attributes:
        states, scales: as `SignalBatch.layers` and `SignalBatch.layer_scales`.
        final: final hidden states, [tokens, width of the head]; None without.
    """

    support: Layers
    states: Tensor
    scales: Tensor | None
    final: Tensor | None

    @property
    def code(self) -> int:
        """The support's types and part, and the number of layers where it does not list them, for the header."""
        spread = self.support.layers if isinstance(self.support.layers, int) else 0
        types = _DTYPES.index(self.support.dtype) + len(_DTYPES) * _FINAL_DTYPES.index(self.support.final)
        return types + len(_DTYPES) * len(_FINAL_DTYPES) * spread + _PART_UNIT * _PARTS.index(self.support.part)

    def to_arrays(self) -> list[np.ndarray]:
        """Return the columns in their order."""
        numbers = () if isinstance(self.support.layers, int) else self.support.layers
        sizes = (len(numbers), 0 if self.final is None else self.final.shape[1])
        tensors = (self.states, self.scales, self.final)
        return [
            np.asarray([*sizes, *numbers], "<u4"),
            # flat, because an empty selection may have strides of 0
            *(tensor.reshape(-1).view(torch.uint8).numpy() for tensor in tensors if tensor is not None),
        ]

    @classmethod
    def read(cls, code: int, tokens: int, width: int, read_column: Callable[..., np.ndarray]) -> "LayerColumns":
        """Read the columns of `tokens` positions.

        Args:
            code: `code`, from the header.
            width: size of a layer's states.
            read_column: returns the next column, `read_column(dtype, *shape)`.

        Raises:
            ValueError: the columns contradict themselves.
        """
        part, rest = divmod(code, _PART_UNIT)
        if part >= len(_PARTS):
            raise ValueError("has a part of layers that this version of rayk does not know")
        spread, types = divmod(rest, len(_DTYPES) * len(_FINAL_DTYPES))
        final, dtype = divmod(types, len(_DTYPES))
        listed, final_width = read_column("<u4", 2).tolist()
        counts_fit = (listed > 0) != (spread > 0) and spread <= _MOST_LAYERS and 0 < width <= _WIDEST
        if not counts_fit or (final > 0) != (final_width > 0):
            raise ValueError("has no layers, an impossible number of them, or states without width")
        numbers = tuple(read_column("<u4", listed).tolist())
        support = Layers(spread or numbers, _DTYPES[dtype], _FINAL_DTYPES[final], _PARTS[part])

        def read(name: str, *shape: int) -> Tensor:
            kind = torch.int8 if name == "int8" else DTYPES[name]
            raw = torch.tensor(read_column("u1", math.prod(shape) * kind.itemsize))
            return raw.view(kind).reshape(shape)

        states = read(support.dtype, tokens, support.count, width)
        blocks = -(-width // STATE_BLOCK)
        scales = read("bfloat16", tokens, support.count, blocks) if support.dtype == "int8" else None
        return cls(support, states, scales, read(support.final, tokens, final_width) if support.final else None)
