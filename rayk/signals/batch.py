"""The teacher's output for sequences: `SignalBatch` in memory, `encode` and `decode` for the network.

A signal covers the *counted* tokens of a sequence. Position i of a row is the teacher's distribution of the i-th
counted token given all tokens before it. A row contains counted tokens only, so the teacher may read another context
than the student.

The wire format is one flat byte array: a fixed header and the columns, little-endian. Token ids take 2 bytes if the
vocabulary allows it, else 4; log-probs are float16, the tail and the actual token's log-prob float32. The tail is
computed before rounding and sent as a separate number, because a tail derived from rounded log-probs would be negative
on peaked rows.
"""

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rayk.config.support import Hidden, Logprob, Requested, Sampled, Support, TopK
from rayk.errors import InputError
from rayk.models import DTYPES, Head

_MAGIC = b"RKS1"
_SEAL = struct.Struct("<4sI")  # magic, CRC-32 of all bytes after it
_HEADER = struct.Struct("<IIIIIIdQ")  # support code, rows, tokens, width, vocabulary, temperatures, tau, seed or dtype
_SUPPORTS: tuple[type, ...] = (TopK, Logprob, Requested, Sampled, Hidden)  # a support's code is its index here
_HIDDEN_DTYPES: tuple[Literal["float16", "bfloat16", "float32"], ...] = ("float16", "bfloat16", "float32")
_SHORT_ID_VOCAB = 1 << 16
COLUMNS = ("target_logprobs", "ids", "logprobs", "log_tails", "weights", "entropies", "hidden")


class CorruptSignal(ValueError):
    """Bytes that are not a valid signal."""


@dataclass(frozen=True)
class SignalBatch:
    """Signals of many sequences, packed row after row. The support determines the columns.

    Attributes:
        support: the part of the distribution that the signals contain.
        offsets: int64 [rows + 1]; row r consists of the positions offsets[r]:offsets[r + 1].
        target_logprobs: float32 [tokens], log p of the actual next token, in nats.
        vocab_size: the teacher's real vocabulary.
        ids: int64 [tokens, k], unique at each position, likeliest first (`topk`, `requested`; `sampled`: in no order).
        logprobs: float32 [tokens, k], log p of `ids` at temperature 1 (`topk`, `requested`).
        log_tails: float32 [tokens, temperatures], log Σ p^(1/T) over the tokens not in `ids`; -inf if `ids` has all
            tokens (`topk`, `requested`).
        weights: float32 [tokens, k], unbiased estimates of p at `ids`; 0 marks an id that only fills the row
            (`sampled`).
        entropies: float32 [tokens], the teacher's entropy in nats (`sampled`).
        hidden: [tokens, width] in the support's dtype, final hidden states (`hidden`).
        head: the map from `hidden` to logits. It is not part of the wire format; the client adds it.
    """

    support: Support
    offsets: Tensor
    target_logprobs: Tensor
    vocab_size: int
    ids: Tensor | None = None
    logprobs: Tensor | None = None
    log_tails: Tensor | None = None
    weights: Tensor | None = None
    entropies: Tensor | None = None
    hidden: Tensor | None = None
    head: Head | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def tokens(self) -> int:
        """Number of counted positions in the batch."""
        return len(self.target_logprobs)

    def to(self, device: torch.device | str) -> "SignalBatch":
        """Return the same signals on `device`."""
        head = None if self.head is None else self.head.to(device)
        return replace(self._map(lambda column: column.to(device), self.offsets), head=head)

    def select(self, rows: Sequence[int]) -> "SignalBatch":
        """Return the given rows, in the given order."""
        starts, lengths = self.offsets[:-1], self.offsets.diff()
        chosen = torch.as_tensor(rows, dtype=torch.long, device=self.offsets.device)
        offsets = _to_offsets(lengths[chosen])
        within = torch.arange(int(offsets[-1]), device=offsets.device) - offsets[:-1].repeat_interleave(lengths[chosen])
        positions = starts[chosen].repeat_interleave(lengths[chosen]) + within
        return self._map(lambda column: column[positions], offsets)

    def slice_tokens(self, chosen: slice) -> "SignalBatch":
        """Return the positions `chosen` as one row, without a copy."""
        length = len(range(*chosen.indices(self.tokens)))
        return self._map(lambda column: column[chosen], torch.tensor([0, length]))

    def select_tokens(self, positions: Tensor) -> "SignalBatch":
        """Return the given positions, in the given order, as one row."""
        return self._map(lambda column: column[positions], torch.tensor([0, len(positions)]))

    def at_temperature(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return the teacher's coarse-grained distribution: log-probs of `ids` [tokens, k] and of the tail [tokens].

        They are normalized over the k + 1 outcomes, so that they sum to 1 in spite of rounding in the wire format.

        Raises:
            InputError: the support has no such distribution, or the signal does not contain this temperature.
        """
        if not isinstance(self.support, TopK | Requested) or self.logprobs is None or self.log_tails is None:
            advice = {
                "sampled": "it estimates forward KL and cross-entropy only",
                "hidden": "use its logits()",
                "logprob": "kl_estimate needs only the actual tokens' log-probs",
            }[self.support.kind]
            raise InputError(
                f"A '{self.support.kind}' signal has no top-k distribution ({advice}); request support 'topk' or "
                "'hidden'."
            )
        if temperature not in self.support.temperatures:
            raise InputError(
                f"The signal does not contain temperature {temperature:g} (it has "
                f"{', '.join(f'{t:g}' for t in self.support.temperatures)}); add it to the support's 'temperatures', "
                "since the tail at another temperature cannot be computed from the top k."
            )
        tail = self.log_tails[:, self.support.temperatures.index(temperature)]
        outcomes = torch.cat([self.logprobs / temperature, tail[:, None]], dim=1)
        outcomes = outcomes - outcomes.logsumexp(dim=1, keepdim=True)
        return outcomes[:, :-1], outcomes[:, -1]

    def logits(self) -> Tensor:
        """Return the teacher's logits over its whole vocabulary, float32 [tokens, columns of its head] (`hidden`).

        Raises:
            InputError: the signal contains no hidden states, or `head` is not set.
        """
        if self.hidden is None or self.head is None:
            raise InputError("Only a 'hidden' signal with its teacher's head has logits; request support 'hidden'.")
        return self.head.logits(self.hidden.to(self.head.weight.dtype))

    def invalid_rows(self) -> dict[int, str]:
        """Return the index of each row that cannot be trained on, with the reason: NaN, infinite values, a log-prob
        clearly above 0, or an id out of range."""
        wrong = {
            "an actual token with a log-prob of NaN, of -inf, or above 0": (
                ~(self.target_logprobs <= 1e-3) | self.target_logprobs.isneginf()
            )
        }
        if self.logprobs is not None:
            wrong["a log-prob of NaN or above 0"] = ~(self.logprobs <= 1e-3).all(1)
        if self.log_tails is not None:
            wrong["a tail of NaN or +inf"] = (self.log_tails.isnan() | self.log_tails.isposinf()).any(1)
        if self.ids is not None:
            wrong[f"a token id outside the vocabulary of {self.vocab_size}"] = (self.ids >= self.vocab_size).any(1)
        if self.weights is not None:
            wrong["a weight that is negative or not finite"] = ~((self.weights >= 0) & self.weights.isfinite()).all(1)
        if self.hidden is not None:
            wrong["a hidden state of NaN or inf"] = ~self.hidden.isfinite().all(1)
        found: dict[int, str] = {}
        for reason, positions in wrong.items():
            for row in torch.searchsorted(self.offsets, positions.nonzero()[:, 0], right=True).sub(1).tolist():
                found.setdefault(row, reason)
        return found

    def _map(self, change: Callable[[Tensor], Tensor], offsets: Tensor) -> "SignalBatch":
        columns: dict[str, Any] = {
            name: change(column) for name in COLUMNS if (column := getattr(self, name)) is not None
        }
        return replace(self, offsets=offsets.to(columns["target_logprobs"].device), **columns)


def concatenate(batches: Sequence[SignalBatch]) -> SignalBatch:
    """Concatenate the rows of all `batches`, which must have the same support."""
    first = batches[0]
    columns: dict[str, Any] = {
        name: torch.cat([getattr(batch, name) for batch in batches])
        for name in COLUMNS
        if getattr(first, name) is not None
    }
    return replace(first, offsets=_to_offsets(torch.cat([batch.offsets.diff() for batch in batches])), **columns)


def fill_distinct(ids: Tensor, used: Tensor) -> Tensor:
    """Replace each unused id in `ids` [tokens, k] by the smallest id that is not yet in its row.

    All ids of a row are then distinct, which gather and scatter operations require.
    """
    tokens, k = ids.shape
    # The last column is for ids from k on, which are never replacements.
    taken = torch.zeros(tokens, k + 1, dtype=torch.bool, device=ids.device)
    taken.scatter_(1, torch.where(used & (ids < k), ids, k), True)
    free = taken[:, :k].to(torch.uint8).argsort(dim=1, stable=True)
    rank = (~used).cumsum(1).sub(1).clamp(min=0)
    return torch.where(used, ids, free.gather(1, rank))


def encode(signals: SignalBatch) -> np.ndarray:
    """Return the wire format, uint8 [bytes].

    `topk` takes 4·k + 8 bytes per token for vocabularies up to 65,536, else 6·k + 8, plus 4 per row; `sampled` takes 3
    (5) bytes per distinct id + 9, `hidden` 2·width + 4.
    """
    support = signals.support
    width, temperatures, tau, extra = 0, np.zeros(0, "<f8"), 0.0, 0
    columns = [signals.offsets.diff().numpy().astype("<u4"), signals.target_logprobs.numpy().astype("<f4")]
    id_type = "<u2" if signals.vocab_size <= _SHORT_ID_VOCAB else "<u4"
    match support:
        case TopK() | Requested():
            ids, logprobs, log_tails = _columns_as_numpy(signals, "ids", "logprobs", "log_tails")
            width, temperatures = ids.shape[1], np.asarray(support.temperatures, "<f8")
            extra = support.k
            columns += [
                temperatures, log_tails.astype("<f4"), logprobs.clip(min=-65504).astype("<f2"), ids.astype(id_type),
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
    header = _HEADER.pack(
        _SUPPORTS.index(type(support)), len(signals), signals.tokens, width, signals.vocab_size, len(temperatures), tau,
        extra,
    )  # fmt: skip
    body = b"".join([header, *(column.tobytes() for column in columns)])
    return np.frombuffer(_SEAL.pack(_MAGIC, zlib.crc32(body)) + body, np.uint8)


def decode(wire: np.ndarray | bytes) -> SignalBatch:
    """Decode `wire` to signals on the CPU.

    Raises:
        CorruptSignal: `wire` has another format version, is truncated, or does not match its CRC-32.
    """
    data = memoryview(wire.data if isinstance(wire, np.ndarray) else wire).cast("B")
    if len(data) < _SEAL.size + _HEADER.size or bytes(data[:4]) != _MAGIC:
        raise CorruptSignal("These bytes are not a rayk signal of wire version 1.")
    _, checksum = _SEAL.unpack_from(data)
    if zlib.crc32(data[_SEAL.size :]) != checksum:
        raise CorruptSignal("A signal was damaged: its checksum does not match.")
    code, rows, tokens, width, vocab_size, n_temperatures, tau, extra = _HEADER.unpack_from(data, _SEAL.size)
    position = _SEAL.size + _HEADER.size

    def read_column(dtype: str, *shape: int) -> np.ndarray:
        nonlocal position
        count = int(np.prod(shape))
        column = np.frombuffer(data, dtype, count, position).reshape(shape)
        position += column.nbytes
        return column

    id_type = "<u2" if vocab_size <= _SHORT_ID_VOCAB else "<u4"
    offsets = _to_offsets(torch.from_numpy(read_column("<u4", rows).astype(np.int64)))
    signals = SignalBatch(Logprob(), offsets, torch.tensor(read_column("<f4", tokens)), vocab_size)
    kind = _SUPPORTS[code]
    if kind is Sampled:
        entropies, counts = torch.tensor(read_column("<f4", tokens)), read_column("u1", tokens)
        used = np.arange(width) < counts[:, None]
        weights, ids = np.zeros((tokens, width), np.float32), np.zeros((tokens, width), np.int64)
        total = int(counts.sum(dtype=np.int64))
        weights[used] = read_column("u1", total).astype(np.float32) / width if tau == 1.0 else read_column("<f4", total)
        ids[used] = read_column(id_type, total)
        return replace(
            signals, support=Sampled(width, tau, extra), weights=torch.from_numpy(weights),
            ids=fill_distinct(torch.from_numpy(ids), torch.from_numpy(used)),
            entropies=entropies,
        )  # fmt: skip
    if kind is Hidden:
        dtype = _HIDDEN_DTYPES[extra]
        raw = torch.tensor(read_column("u1", tokens, width * DTYPES[dtype].itemsize))
        return replace(signals, support=Hidden(dtype), hidden=raw.view(DTYPES[dtype]))
    if kind is Logprob:
        return signals
    temperatures = tuple(float(t) for t in read_column("<f8", n_temperatures))
    log_tails = torch.tensor(read_column("<f4", tokens, n_temperatures))
    logprobs = torch.from_numpy(read_column("<f2", tokens, width).astype(np.float32))
    return replace(
        signals, support=kind(extra, temperatures), logprobs=logprobs, log_tails=log_tails,
        ids=torch.from_numpy(read_column(id_type, tokens, width).astype(np.int64)),
    )  # fmt: skip


def _columns_as_numpy(signals: SignalBatch, *names: str) -> list[np.ndarray]:
    return [getattr(signals, name).numpy() for name in names]


def _to_offsets(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
