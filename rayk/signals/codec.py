"""Signals as they lie on disk: `pack` and `unpack`, smaller than the wire and read row by row.

A top-k row keeps its ids and their order, its tails and the actual tokens' log-probs exactly, and its log-probs in
steps: each is stored as 8 − log p with 6 bits of mantissa, so a step is 1/8 nat below 8 nats and doubles at 8, 24, 56,
… nats, where there is little mass to be wrong about. A uniform error of such a step costs a distribution step²/24 nats,
6.5e-4 at most at temperatures from 1 on. Those numbers' bit patterns rise with 8 − log p, so neighbours differ by small
whole numbers, and each byte plane of these and of the ids goes through zstd by itself.

Every other support keeps its wire form, through zstd.
"""

import struct

import numpy as np
import pyarrow as pa
import torch

from rayk.config.support import Support, TopK
from rayk.signals.batch import CorruptSignal, SignalBatch, decode, encode

CODEC_VERSION = 1
"""Part of every cache key: another version's entries are not found rather than misread."""

_HEADER = struct.Struct("<III")  # tokens, k, vocabulary
_LENGTH = struct.Struct("<I")
_OFFSET = np.float32(8.0)
_DROPPED_BITS = 17  # of float32's 23 bits of mantissa; 6 are kept
_FIRST = int(_OFFSET.view(np.uint32)) >> _DROPPED_BITS
_LOWEST = -65504.0  # float16's, to which the wire has cut an impossible token


def pack(signals: SignalBatch) -> list[bytes]:
    """Each row of `signals` as an entry that `unpack` reads without the others. `requested` signals have no such form:
    their ids change with every step."""
    rows = [signals.select([row]) for row in range(len(signals))]
    if isinstance(signals.support, TopK):
        return [_pack_topk(row) for row in rows]
    return [_LENGTH.pack(len(wire)) + _compress(wire) for wire in (encode(row).tobytes() for row in rows)]


def unpack(entry: bytes, support: Support) -> SignalBatch:
    """The row in `entry`, which answers a request for `support`.

    Raises:
        CorruptSignal: the entry holds something else. Damage is for the entry's keeper to notice, by a checksum.
    """
    try:
        if isinstance(support, TopK):
            return _unpack_topk(entry, support)
        (size,) = _LENGTH.unpack_from(entry)
        signals = decode(_decompress(entry[_LENGTH.size :], size))
    except (struct.error, pa.ArrowException, OSError, ValueError) as error:
        raise CorruptSignal(f"An entry holds no '{support.kind}' signal of codec version {CODEC_VERSION}.") from error
    if signals.support != support:
        raise CorruptSignal(f"An entry asked for as {support} holds {signals.support}.")
    return signals


def _pack_topk(row: SignalBatch) -> bytes:
    assert row.ids is not None and row.logprobs is not None and row.log_tails is not None
    floats = np.concatenate([row.target_logprobs.numpy()[:, None], row.log_tails.numpy()], axis=1)
    levels = _levels(row.logprobs.numpy())
    steps = np.diff(levels, axis=1, prepend=np.full((len(levels), 1), _FIRST))
    assert (steps >= 0).all(), "a top-k signal lists its ids likeliest first"
    # Rank after rank rather than token after token: equal ranks have like steps.
    return _HEADER.pack(row.tokens, row.ids.shape[1], row.vocab_size) + b"".join(
        [
            *_pack_planes(floats.astype("<f4")),
            *_pack_planes(row.ids.numpy().astype("<u4"))[: _id_bytes(row.vocab_size)],
            *_pack_planes(steps.T.astype("<u2")),
        ]
    )


def _unpack_topk(entry: bytes, support: TopK) -> SignalBatch:
    tokens, k, vocab_size = _HEADER.unpack_from(entry)
    if k != support.k:
        raise ValueError(f"k is {k}")
    position = _HEADER.size

    def planes(count: int, dtype: str, *shape: int) -> np.ndarray:
        """The next `count` byte planes, the others being 0."""
        nonlocal position
        columns = np.zeros((int(np.prod(shape)), np.dtype(dtype).itemsize), np.uint8)
        for plane in range(count):
            (size,) = _LENGTH.unpack_from(entry, position)
            position += _LENGTH.size
            columns[:, plane] = np.frombuffer(_decompress(entry[position : position + size], len(columns)), np.uint8)
            position += size
        return columns.view(dtype).reshape(shape)

    floats = planes(4, "<f4", tokens, 1 + len(support.temperatures))
    ids = planes(_id_bytes(vocab_size), "<u4", tokens, k)
    steps = planes(2, "<u2", k, tokens).T
    levels = _FIRST + np.cumsum(steps, axis=1, dtype=np.int64)
    logprobs = _OFFSET - (levels.astype(np.uint32) << _DROPPED_BITS).view(np.float32)
    return SignalBatch(
        support, torch.tensor([0, tokens]), torch.from_numpy(floats[:, 0].copy()), vocab_size,
        ids=torch.from_numpy(ids.astype(np.int64)), logprobs=torch.from_numpy(logprobs),
        log_tails=torch.from_numpy(floats[:, 1:].copy()),
    )  # fmt: skip


def _levels(logprobs: np.ndarray) -> np.ndarray:
    """The step each log-prob is nearest to, int64; 0 and what rounding has left above it are the first."""
    bits = (_OFFSET - logprobs.clip(_LOWEST, 0.0)).view(np.uint32).astype(np.int64)
    return (bits + (1 << (_DROPPED_BITS - 1))) >> _DROPPED_BITS


def _id_bytes(vocab_size: int) -> int:
    return 2 if vocab_size <= 1 << 16 else 3 if vocab_size <= 1 << 24 else 4


def _pack_planes(column: np.ndarray) -> list[bytes]:
    """Each byte of the items, all items' first, then all second ones, compressed, with its length before it."""
    planes = np.ascontiguousarray(column).view(np.uint8).reshape(column.size, column.itemsize)
    compressed = [_compress(planes[:, plane].tobytes()) for plane in range(column.itemsize)]
    return [_LENGTH.pack(len(plane)) + plane for plane in compressed]


def _compress(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


def _decompress(data: bytes, size: int) -> bytes:
    return pa.decompress(data, decompressed_size=size, codec="zstd", asbytes=True)
