"""The columns of a `SignalBatch` packed into one row of bytes per position, with the numbers of the wire format.

vLLM's workers return signals in this form. The rows of parts of a sequence, and of several sequences, can be
concatenated without decoding them.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from rayk.config.support import Hidden, Logprob, Requested, Sampled, Support, TopK
from rayk.models import DTYPES
from rayk.signals.wire import LOWEST_LOGPROB, SHORT_ID_VOCAB

_Layout = list[tuple[str, torch.dtype, int]]


def pack_columns(columns: Mapping[str, Tensor], support: Support, vocab_size: int) -> Tensor:
    """Return the columns as uint8 [tokens, bytes], on their device.

    Log-probs are rounded to float16 and hidden states to the support's dtype; all other numbers are exact.
    """
    parts = []
    for name, dtype, _ in _layout(support, vocab_size, 0, 0):
        column = columns[name]
        if name == "logprobs":
            column = column.clamp(min=LOWEST_LOGPROB)
        parts.append(column.to(dtype).reshape(len(column), math.prod(column.shape[1:])).contiguous().view(torch.uint8))
    return torch.cat(parts, dim=1)


def row_bytes(support: Support, vocab_size: int, requested: int = 0, hidden_size: int = 0) -> int:
    """Return the number of bytes of a position.

    Args:
        requested: number of requested ids per position.
        hidden_size: width of hidden states.
    """
    return sum(dtype.itemsize * width for _, dtype, width in _layout(support, vocab_size, requested, hidden_size))


def unpack_columns(
    packed: Tensor, support: Support, vocab_size: int, requested: int = 0, hidden_size: int = 0
) -> dict[str, Tensor]:
    """Return the columns in `packed`, uint8 [tokens, bytes] on the CPU, with the types of a `SignalBatch`. The other
    arguments are those of `row_bytes`.

    Raises:
        ValueError: the number of bytes of a row is another one.
    """
    layout = _layout(support, vocab_size, requested, hidden_size)
    sizes = [dtype.itemsize * width for _, dtype, width in layout]
    if packed.shape[1] != sum(sizes):
        raise ValueError(f"a row has {packed.shape[1]} bytes instead of {sum(sizes)}")
    columns = {}
    for (name, dtype, _), part in zip(layout, packed.split(sizes, dim=1), strict=True):
        column = part.contiguous().view(dtype)
        if name in ("target_logprobs", "entropies"):
            column = column[:, 0]
        elif name == "logprobs":
            column = column.float()
        elif name == "ids":
            column = column.long() & (0xFFFF if dtype == torch.int16 else 0xFFFFFFFF)
        columns[name] = column
    return columns


def _layout(support: Support, vocab_size: int, requested: int, hidden_size: int) -> _Layout:
    """Return name, type and width of each column in its place."""
    id_type = torch.int16 if vocab_size <= SHORT_ID_VOCAB else torch.int32
    layout: _Layout = [("target_logprobs", torch.float32, 1)]
    match support:
        case TopK() | Requested():
            width = min(support.k + requested, vocab_size)
            layout += [
                ("log_tails", torch.float32, len(support.temperatures)), ("logprobs", torch.float16, width),
                ("ids", id_type, width),
            ]  # fmt: skip
        case Sampled():
            layout += [
                ("entropies", torch.float32, 1), ("weights", torch.float32, support.draws),
                ("ids", id_type, support.draws),
            ]  # fmt: skip
        case Hidden():
            layout += [("hidden", DTYPES[support.dtype], hidden_size)]
        case Logprob():
            pass
    return layout
