"""The wire format of signals: `encode` and `decode`.

It is one flat byte array: a fixed header and the columns, little-endian. Token ids take 2 bytes if the vocabulary
allows it, else 4; log-probs are float16, the tail and the actual token's log-prob float32. The tail is computed before
rounding and sent as a separate number, because a tail derived from rounded log-probs would be negative on peaked
rows.
"""

import math
import struct
import zlib
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
import torch

from rayk.config.support import Hidden, Layers, Logprob, Requested, Sampled, TopK
from rayk.models import DTYPES
from rayk.signals.batch import SignalBatch, fill_distinct, to_offsets
from rayk.signals.layer_states import LayerColumns

_MAGIC = b"RKS1"
_SEAL = struct.Struct("<4sI")  # magic, CRC-32 of all bytes after it
_HEADER = struct.Struct("<IIIIIIdQ")  # support code, rows, tokens, width, vocabulary, temperatures, tau, seed or dtype
_SUPPORTS: tuple[type, ...] = (TopK, Logprob, Requested, Sampled, Hidden, Layers)  # a support's code is its index here
_HIDDEN_DTYPES: tuple[Literal["float16", "bfloat16", "float32"], ...] = ("float16", "bfloat16", "float32")
_HEADER_BYTES = _SEAL.size + _HEADER.size
SHORT_ID_VOCAB = 1 << 16
"""The largest vocabulary whose ids take two bytes."""
_MOST_DRAWS = 255
"""The largest number of draws of a `sampled` signal, whose counts are single bytes."""
LOWEST_LOGPROB = -65504.0
"""float16's lowest number, which stands for the log-prob of impossible tokens."""


class CorruptSignal(ValueError):
    """Bytes that are not a valid signal."""


def encode(signals: SignalBatch) -> np.ndarray:
    """Return the wire format, uint8 [bytes].

    `topk` takes 4·k + 8 bytes per token for vocabularies up to 65,536, else 6·k + 8, plus 4 per row; `sampled` takes 3
    (5) bytes per distinct id + 9, `hidden` 2·width + 4, `layers` 1.0625·width + 4 with one layer.
    """
    support = signals.support
    width, temperatures, tau, extra = 0, np.zeros(0, "<f8"), 0.0, 0
    columns = [signals.offsets.diff().numpy().astype("<u4"), signals.target_logprobs.numpy().astype("<f4")]
    id_type = _id_type(signals.vocab_size)
    match support:
        case TopK() | Requested():
            ids, logprobs, log_tails = _columns_as_numpy(signals, "ids", "logprobs", "log_tails")
            width, temperatures = ids.shape[1], np.asarray(support.temperatures, "<f8")
            extra = support.k
            columns += [
                temperatures, log_tails.astype("<f4"), logprobs.clip(min=LOWEST_LOGPROB).astype("<f2"),
                ids.astype(id_type),
            ]  # fmt: skip
        case Sampled():
            ids, weights, entropies = _columns_as_numpy(signals, "ids", "weights", "entropies")
            width, tau, extra = support.draws, support.tau, support.seed
            used = weights > 0
            values = np.rint(weights[used] * width).astype("u1") if tau == 1.0 else weights[used].astype("<f4")
            columns += [entropies.astype("<f4"), used.sum(1).astype("u1"), values, ids[used].astype(id_type)]
        case Hidden():
            assert signals.hidden is not None
            width, extra = signals.hidden.shape[1], _HIDDEN_DTYPES.index(support.dtype)
            columns.append(signals.hidden.contiguous().view(torch.uint8).numpy())
        case Layers():
            assert signals.layers is not None
            stored = LayerColumns(support, signals.layers, signals.layer_scales, signals.hidden)
            width, extra = signals.layers.shape[2], stored.code
            columns += stored.to_arrays()
    header = _HEADER.pack(
        _SUPPORTS.index(type(support)), len(signals), signals.tokens, width, signals.vocab_size, len(temperatures), tau,
        extra,
    )  # fmt: skip
    body = b"".join([header, *(column.tobytes() for column in columns)])
    return np.frombuffer(_SEAL.pack(_MAGIC, zlib.crc32(body)) + body, np.uint8)


class _Header(NamedTuple):
    """The fixed part of the wire format."""

    code: int
    """Index of the support in `_SUPPORTS`."""
    rows: int
    tokens: int
    width: int
    vocab_size: int
    temperatures: int
    tau: float
    extra: int
    """The support's k, its seed, the index of its dtype, or `LayerColumns.code`."""


class _Columns:
    """Reads the columns of a signal one after another.

    A column's size is compared with the bytes that are left before anything is allocated, so that a damaged or hostile
    signal takes no more memory than its own bytes justify.
    """

    def __init__(self, data: memoryview, position: int):
        self._data, self._position = data, position

    def read(self, dtype: str, *shape: int) -> np.ndarray:
        count = math.prod(shape)
        if count * np.dtype(dtype).itemsize > len(self._data) - self._position:
            raise CorruptSignal("A signal declares more values than it has bytes.")
        column = np.frombuffer(self._data, dtype, count, self._position).reshape(shape)
        self._position += column.nbytes
        return column

    def check_end(self) -> None:
        if self._position != len(self._data):
            raise CorruptSignal("A signal has more bytes than it declares values.")


def decode(wire: np.ndarray | bytes) -> SignalBatch:
    """Decode `wire` to signals on the CPU.

    Raises:
        CorruptSignal: `wire` has another format version, is truncated, contradicts itself, or does not match its
            CRC-32.
    """
    data = memoryview(wire.data if isinstance(wire, np.ndarray) else wire).cast("B")
    if len(data) < _HEADER_BYTES or bytes(data[:4]) != _MAGIC:
        raise CorruptSignal("These bytes are not a rayk signal of wire version 1.")
    _, checksum = _SEAL.unpack_from(data)
    if zlib.crc32(data[_SEAL.size :]) != checksum:
        raise CorruptSignal("A signal was damaged: its checksum does not match.")
    header = _Header._make(_HEADER.unpack_from(data, _SEAL.size))
    if header.code >= len(_SUPPORTS):
        raise CorruptSignal("A signal has a support that this version of rayk does not know.")
    columns = _Columns(data, _HEADER_BYTES)
    lengths = columns.read("<u4", header.rows).astype(np.int64)
    if lengths.sum() != header.tokens:
        raise CorruptSignal("The rows of a signal do not have as many tokens as the signal.")
    target_logprobs = torch.tensor(columns.read("<f4", header.tokens))
    signals = SignalBatch(Logprob(), to_offsets(torch.from_numpy(lengths)), target_logprobs, header.vocab_size)
    kind = _SUPPORTS[header.code]
    if kind is Sampled:
        signals = _read_sampled(signals, header, columns)
    elif kind is Hidden:
        signals = _read_hidden(signals, header, columns)
    elif kind is Layers:
        signals = _read_layers(signals, header, columns)
    elif kind is not Logprob:
        signals = _read_ids(signals, header, columns)
    columns.check_end()
    return signals


def _read_sampled(signals: SignalBatch, header: _Header, columns: _Columns) -> SignalBatch:
    tokens, width, tau = header.tokens, header.width, header.tau
    if not (1 <= width <= _MOST_DRAWS and 0 < tau < math.inf):
        raise CorruptSignal("A 'sampled' signal has an impossible number of draws or exponent.")
    entropies, counts = torch.tensor(columns.read("<f4", tokens)), columns.read("u1", tokens)
    if counts.max(initial=0) > width:
        raise CorruptSignal("A 'sampled' signal has more ids at a position than draws.")
    total = int(counts.sum(dtype=np.int64))
    drawn = columns.read("u1", total).astype(np.float32) / width if tau == 1.0 else columns.read("<f4", total)
    drawn_ids = columns.read(_id_type(header.vocab_size), total)
    used = np.arange(width) < counts[:, None]
    weights, ids = np.zeros((tokens, width), np.float32), np.zeros((tokens, width), np.int64)
    weights[used], ids[used] = drawn, drawn_ids
    return replace(
        signals, support=Sampled(width, tau, header.extra), weights=torch.from_numpy(weights),
        ids=fill_distinct(torch.from_numpy(ids), torch.from_numpy(used)), entropies=entropies,
    )  # fmt: skip


def _read_hidden(signals: SignalBatch, header: _Header, columns: _Columns) -> SignalBatch:
    if header.extra >= len(_HIDDEN_DTYPES) or not header.width:
        raise CorruptSignal("A 'hidden' signal has no width, or a dtype that this version of rayk does not know.")
    name = _HIDDEN_DTYPES[header.extra]
    raw = torch.tensor(columns.read("u1", header.tokens, header.width * DTYPES[name].itemsize))
    return replace(signals, support=Hidden(name), hidden=raw.view(DTYPES[name]))


def _read_layers(signals: SignalBatch, header: _Header, columns: _Columns) -> SignalBatch:
    try:
        stored = LayerColumns.read(header.extra, header.tokens, header.width, columns.read)
    except CorruptSignal:
        raise
    except ValueError as error:
        raise CorruptSignal(f"A 'layers' signal {error}.") from error
    return replace(
        signals, support=stored.support, layers=stored.states, layer_scales=stored.scales, hidden=stored.final
    )


def _read_ids(signals: SignalBatch, header: _Header, columns: _Columns) -> SignalBatch:
    """Read the columns of supports `topk` and `requested`."""
    tokens, width = header.tokens, header.width
    temperatures = tuple(columns.read("<f8", header.temperatures).tolist())
    if not all(0 < temperature < math.inf for temperature in temperatures) or header.extra > width:
        raise CorruptSignal("A signal has impossible temperatures, or fewer ids than its k.")
    kind = _SUPPORTS[header.code]
    log_tails = torch.tensor(columns.read("<f4", tokens, header.temperatures))
    logprobs = torch.from_numpy(columns.read("<f2", tokens, width).astype(np.float32))
    ids = torch.from_numpy(columns.read(_id_type(header.vocab_size), tokens, width).astype(np.int64))
    support = kind(header.extra, temperatures)
    return replace(signals, support=support, logprobs=logprobs, log_tails=log_tails, ids=ids)


def _id_type(vocab_size: int) -> str:
    return "<u2" if vocab_size <= SHORT_ID_VOCAB else "<u4"


def _columns_as_numpy(signals: SignalBatch, *names: str) -> list[np.ndarray]:
    return [getattr(signals, name).numpy() for name in names]
