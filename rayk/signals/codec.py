"""The disk format of signals: `pack` and `unpack`, smaller than the wire format and readable row by row.

A top-k row stores its ids and their order, its tails and the actual tokens' log-probs exactly, and its log-probs
rounded: each is stored as 8 − log p with 6 bits of mantissa. The rounding step is therefore 1/8 nat where −log p is
below 8 nats, and doubles at 8, 24, 56, … nats, where the probabilities are small. A uniform rounding error of one step
changes a distribution by step²/24 nats, at most 6.5e-4 at temperatures of at least 1. The bit patterns increase with
8 − log p, so neighbors differ by small integers. Each byte plane of the differences and of the ids is compressed by
zstd on its own.

All other supports store the wire format, compressed by zstd.
"""

import math
import struct

import numpy as np
import pyarrow as pa
import torch

from rayk.config.support import Layers, Sampled, Support, TopK, bytes_per_token
from rayk.signals.batch import SignalBatch
from rayk.signals.wire import LOWEST_LOGPROB, CorruptSignal, decode, encode

CODEC_VERSION = 1
"""Part of every cache key, so that entries of another codec version are never found and decoded wrongly."""

_HEADER = struct.Struct("<III")  # tokens, k, vocabulary
_LENGTH = struct.Struct("<I")
_OFFSET = np.float32(8.0)
_DROPPED_BITS = 17  # of float32's 23 bits of mantissa; 6 are kept
_FIRST = int(_OFFSET.view(np.uint32)) >> _DROPPED_BITS
_WIDEST = 1 << 16  # hidden states of a model that does not say how wide they are
_LARGEST_HEADER = 1 << 10


def pack(signals: SignalBatch) -> list[bytes]:
    """Encode each row of `signals` as an entry that `unpack` can read on its own.

    `requested` signals are not supported, because their ids change in every step.
    """
    rows = [signals.select([row]) for row in range(len(signals))]
    if isinstance(signals.support, TopK):
        return [_pack_topk(row) for row in rows]
    return [_LENGTH.pack(len(wire)) + _compress(wire) for wire in (encode(row).tobytes() for row in rows)]


def unpack(entry: bytes, support: Support, tokens: int, hidden_size: int = 0) -> SignalBatch:
    """Decode the row in `entry`, which was stored with `support`.

    Sizes that the entry declares are compared with those that `tokens` allows before anything is allocated, because
    compressed bytes can declare and become any number of bytes.

    Args:
        tokens: number of counted tokens of the row.
        hidden_size: width of the teacher's hidden states; 0 if unknown.

    Raises:
        CorruptSignal: the entry does not contain a signal with this support and these tokens, or one that cannot be
            used. Damaged bytes are not detected here but by the checksum of the entry in its segment.
    """
    try:
        if isinstance(support, TopK):
            signals = _unpack_topk(entry, support, tokens)
        else:
            (size,) = _LENGTH.unpack_from(entry)
            if size > _largest_wire(support, tokens, hidden_size):
                raise ValueError("it declares too many bytes")
            signals = decode(_decompress(entry[_LENGTH.size :], size))
    except (struct.error, pa.ArrowException, OSError, ValueError) as error:
        raise CorruptSignal(
            f"An entry does not contain a '{support.kind}' signal of codec version {CODEC_VERSION}."
        ) from error
    if signals.support != support:
        raise CorruptSignal(f"An entry requested as {support} contains {signals.support}.")
    if len(signals) != 1 or signals.tokens != tokens:
        raise CorruptSignal(f"An entry of a row with {tokens} counted tokens contains {signals.tokens}.")
    if unusable := signals.invalid_rows():
        raise CorruptSignal(f"An entry contains {unusable[0]}.")
    return signals


def _largest_wire(support: Support, tokens: int, hidden_size: int) -> int:
    """Return the largest size in bytes of a row in the wire format."""
    if isinstance(support, Sampled):
        return _LARGEST_HEADER + tokens * (9 + 8 * support.draws)
    is_wider = isinstance(support, Layers) and support.part == "attention"  # all heads together, than hidden states
    width = _WIDEST if is_wider or not hidden_size else hidden_size
    return _LARGEST_HEADER + math.ceil(tokens * bytes_per_token(support, 1, width))


def _pack_topk(row: SignalBatch) -> bytes:
    assert row.ids is not None and row.logprobs is not None and row.log_tails is not None
    floats = np.concatenate([row.target_logprobs.numpy()[:, None], row.log_tails.numpy()], axis=1)
    levels = _levels(row.logprobs.numpy())
    steps = np.diff(levels, axis=1, prepend=np.full((len(levels), 1), _FIRST))
    assert (steps >= 0).all(), "a top-k signal lists its ids likeliest first"
    # Ordered by rank, not by token, because steps of the same rank are similar.
    return _HEADER.pack(row.tokens, row.ids.shape[1], row.vocab_size) + b"".join(
        [
            *_pack_planes(floats.astype("<f4")),
            *_pack_planes(row.ids.numpy().astype("<u4"))[: _id_bytes(row.vocab_size)],
            *_pack_planes(steps.T.astype("<u2")),
        ]
    )


def _unpack_topk(entry: bytes, support: TopK, expected_tokens: int) -> SignalBatch:
    tokens, k, vocab_size = _HEADER.unpack_from(entry)
    if (tokens, k) != (expected_tokens, support.k):
        raise ValueError(f"it has {tokens} tokens and k={k}")
    position = _HEADER.size

    def read_planes(count: int, dtype: str, *shape: int) -> np.ndarray:
        """Read the next `count` byte planes; the remaining planes are 0."""
        nonlocal position
        columns = np.zeros((int(np.prod(shape)), np.dtype(dtype).itemsize), np.uint8)
        for plane in range(count):
            (size,) = _LENGTH.unpack_from(entry, position)
            position += _LENGTH.size
            columns[:, plane] = np.frombuffer(_decompress(entry[position : position + size], len(columns)), np.uint8)
            position += size
        return columns.view(dtype).reshape(shape)

    floats = read_planes(4, "<f4", tokens, 1 + len(support.temperatures))
    ids = read_planes(_id_bytes(vocab_size), "<u4", tokens, k)
    steps = read_planes(2, "<u2", k, tokens).T
    if position != len(entry):
        raise ValueError("it is longer than it declares")
    levels = _FIRST + np.cumsum(steps, axis=1, dtype=np.int64)
    logprobs = _OFFSET - (levels.astype(np.uint32) << _DROPPED_BITS).view(np.float32)
    return SignalBatch(
        support, torch.tensor([0, tokens]), torch.from_numpy(floats[:, 0].copy()), vocab_size,
        ids=torch.from_numpy(ids.astype(np.int64)), logprobs=torch.from_numpy(logprobs),
        log_tails=torch.from_numpy(floats[:, 1:].copy()),
    )  # fmt: skip


def _levels(logprobs: np.ndarray) -> np.ndarray:
    """Return the index of the step nearest to each log-prob, int64; a log-prob above 0 (by rounding) counts as 0."""
    bits = (_OFFSET - logprobs.clip(LOWEST_LOGPROB, 0.0)).view(np.uint32).astype(np.int64)
    return (bits + (1 << (_DROPPED_BITS - 1))) >> _DROPPED_BITS


def _id_bytes(vocab_size: int) -> int:
    return 2 if vocab_size <= 1 << 16 else 3 if vocab_size <= 1 << 24 else 4


def _pack_planes(column: np.ndarray) -> list[bytes]:
    """Return one compressed plane per byte of the items (all first bytes, all second bytes, …), each preceded by its
    length."""
    planes = np.ascontiguousarray(column).view(np.uint8).reshape(column.size, column.itemsize)
    compressed = [_compress(planes[:, plane].tobytes()) for plane in range(column.itemsize)]
    return [_LENGTH.pack(len(plane)) + plane for plane in compressed]


def _compress(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


def _decompress(data: bytes, size: int) -> bytes:
    return pa.decompress(data, decompressed_size=size, codec="zstd", asbytes=True)
