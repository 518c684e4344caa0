"""What a teacher says about sequences: `SignalBatch` in memory, `encode`/`decode` for the wire.

A signal covers the *counted* positions of a sequence: the tokens a student learns to predict. Entry i of a row is the
teacher's distribution for the i-th counted token given everything before it, so rows align by counted index and the
teacher may have read another context than the student.

The wire form is one flat byte array: a fixed header, then the columns back to back, little-endian. Token ids take 2
bytes where the vocabulary allows it (4 otherwise), log-probs float16, the tail and the actual token's log-prob
float32. The tail is a number of its own, taken before rounding: derived from rounded log-probs it would be negative
on peaked rows (ALGORITHMS §22).
"""

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rayk.errors import InputError
from rayk.support import Logprob, Support, TopK

_MAGIC = b"RKS1"
_SEAL = struct.Struct("<4sI")  # magic, crc32 of all that follows
_HEADER = struct.Struct("<IIIIII")  # support code, rows, counted tokens, k, vocabulary size, temperatures
_CODES = {"topk": 1, "logprob": 2}
_SHORT_IDS = 1 << 16


class CorruptSignal(ValueError):
    """Bytes that are no signal, or one damaged on its way."""


@dataclass(frozen=True)
class SignalBatch:
    """Signals of many sequences, packed row after row.

    Attributes:
        support: which part of the distribution is here.
        offsets: int64 [rows + 1]; row r holds entries offsets[r]:offsets[r + 1].
        target_logprobs: float32 [tokens], log p of the actual next token, in nats.
        vocab_size: the teacher's real vocabulary.
        ids: int64 [tokens, k], unique in each entry, likeliest first (`topk`).
        logprobs: float32 [tokens, k], log p of `ids` at temperature 1.
        log_tails: float32 [tokens, temperatures], log Σ p^(1/T) over the tokens not in `ids`; -inf where none is left.
    """

    support: Support
    offsets: Tensor
    target_logprobs: Tensor
    vocab_size: int
    ids: Tensor | None = None
    logprobs: Tensor | None = None
    log_tails: Tensor | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def tokens(self) -> int:
        """How many counted positions the batch covers."""
        return len(self.target_logprobs)

    def to(self, device: torch.device | str) -> "SignalBatch":
        """The same signals on `device`."""
        return self._map(lambda column: column.to(device), self.offsets)

    def select(self, rows: Sequence[int]) -> "SignalBatch":
        """The given rows, in the given order."""
        starts, lengths = self.offsets[:-1], self.offsets.diff()
        chosen = torch.as_tensor(rows, dtype=torch.long, device=self.offsets.device)
        offsets = _offsets_of(lengths[chosen])
        within = torch.arange(int(offsets[-1]), device=offsets.device) - offsets[:-1].repeat_interleave(lengths[chosen])
        entries = starts[chosen].repeat_interleave(lengths[chosen]) + within
        return self._map(lambda column: column[entries], offsets)

    def at_temperature(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """The teacher's coarse-grained distribution: log-probs of `ids` [tokens, k] and of the tail bucket [tokens].

        Normalised over the k + 1 outcomes, so that rounding on the wire never leaves a distribution that does not sum
        to one.

        Raises:
            InputError: the support has no ids, or does not carry this temperature.
        """
        if not isinstance(self.support, TopK) or self.logprobs is None or self.log_tails is None:
            raise InputError(
                f"A '{self.support.kind}' signal has no distribution to compare with; ask the teacher for support "
                "'topk', or use kl_estimate, which needs only the actual tokens' log-probs."
            )
        if temperature not in self.support.temperatures:
            raise InputError(
                f"The signal does not carry temperature {temperature:g} (it has "
                f"{', '.join(f'{t:g}' for t in self.support.temperatures)}); add it to the support's 'temperatures', "
                "since the tail at another temperature cannot be computed from the top k."
            )
        tail = self.log_tails[:, self.support.temperatures.index(temperature)]
        outcomes = torch.cat([self.logprobs / temperature, tail[:, None]], dim=1)
        outcomes = outcomes - outcomes.logsumexp(dim=1, keepdim=True)
        return outcomes[:, :-1], outcomes[:, -1]

    def unusable(self) -> dict[int, str]:
        """The rows that cannot be learned from, and why: NaN, ±inf, a log-prob clearly above 0, an id out of range."""
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
            wrong[f"a token id beyond the vocabulary of {self.vocab_size}"] = (self.ids >= self.vocab_size).any(1)
        found: dict[int, str] = {}
        for reason, entries in wrong.items():
            for row in torch.searchsorted(self.offsets, entries.nonzero()[:, 0], right=True).sub(1).tolist():
                found.setdefault(row, reason)
        return found

    def _map(self, change: Callable[[Tensor], Tensor], offsets: Tensor) -> "SignalBatch":
        def changed(column: Tensor | None) -> Tensor | None:
            return None if column is None else change(column)

        target_logprobs = change(self.target_logprobs)
        return replace(
            self,
            offsets=offsets.to(target_logprobs.device),
            target_logprobs=target_logprobs,
            ids=changed(self.ids),
            logprobs=changed(self.logprobs),
            log_tails=changed(self.log_tails),
        )


def concatenate(batches: Sequence[SignalBatch]) -> SignalBatch:
    """Rows of all `batches` (same support), in order."""
    first = batches[0]

    def joined(name: str) -> Tensor | None:
        columns = [getattr(batch, name) for batch in batches]
        return None if columns[0] is None else torch.cat(columns)

    return replace(
        first,
        offsets=_offsets_of(torch.cat([batch.offsets.diff() for batch in batches])),
        target_logprobs=torch.cat([batch.target_logprobs for batch in batches]),
        ids=joined("ids"),
        logprobs=joined("logprobs"),
        log_tails=joined("log_tails"),
    )


def encode(signals: SignalBatch) -> np.ndarray:
    """The wire form, uint8 [bytes]: 4·k + 8 bytes a token for vocabularies up to 65,536, else 6·k + 8, plus 4 a row."""
    columns = [
        signals.offsets.diff().numpy().astype("<u4"),
        signals.target_logprobs.numpy().astype("<f4"),
    ]
    k, temperatures = 0, np.zeros(0, "<f8")
    if isinstance(signals.support, TopK):
        assert signals.ids is not None
        assert signals.logprobs is not None
        assert signals.log_tails is not None
        k, temperatures = signals.ids.shape[1], np.asarray(signals.support.temperatures, "<f8")
        columns += [
            temperatures,
            signals.log_tails.numpy().astype("<f4"),
            signals.logprobs.numpy().clip(min=-65504).astype("<f2"),
            signals.ids.numpy().astype("<u2" if signals.vocab_size <= _SHORT_IDS else "<u4"),
        ]
    code = _CODES[signals.support.kind]
    header = _HEADER.pack(code, len(signals), signals.tokens, k, signals.vocab_size, len(temperatures))
    body = b"".join([header, *(column.tobytes() for column in columns)])
    return np.frombuffer(_SEAL.pack(_MAGIC, zlib.crc32(body)) + body, np.uint8)


def decode(wire: np.ndarray | bytes) -> SignalBatch:
    """The signals in `wire`, on the CPU.

    Raises:
        CorruptSignal: not this version's form, cut off, or changed on the way (CRC-32).
    """
    data = memoryview(wire.data if isinstance(wire, np.ndarray) else wire).cast("B")
    if len(data) < _SEAL.size + _HEADER.size or bytes(data[:4]) != _MAGIC:
        raise CorruptSignal("These bytes are no rayk signal of wire version 1.")
    _, checksum = _SEAL.unpack_from(data)
    if zlib.crc32(data[_SEAL.size :]) != checksum:
        raise CorruptSignal("A signal was damaged on its way: its checksum does not match.")
    code, rows, tokens, k, vocab_size, n_temperatures = _HEADER.unpack_from(data, _SEAL.size)
    position = _SEAL.size + _HEADER.size

    def take(dtype: str, *shape: int) -> np.ndarray:
        nonlocal position
        count = int(np.prod(shape))
        column = np.frombuffer(data, dtype, count, position).reshape(shape)
        position += column.nbytes
        return column

    offsets = _offsets_of(torch.from_numpy(take("<u4", rows).astype(np.int64)))
    target_logprobs = torch.tensor(take("<f4", tokens))
    if code == _CODES["logprob"]:
        return SignalBatch(Logprob(), offsets, target_logprobs, vocab_size)
    temperatures = tuple(float(t) for t in take("<f8", n_temperatures))
    log_tails = torch.tensor(take("<f4", tokens, n_temperatures))
    logprobs = torch.from_numpy(take("<f2", tokens, k).astype(np.float32))
    ids = torch.from_numpy(take("<u2" if vocab_size <= _SHORT_IDS else "<u4", tokens, k).astype(np.int64))
    support = TopK(k, temperatures)
    return SignalBatch(support, offsets, target_logprobs, vocab_size, ids, logprobs, log_tails)


def _offsets_of(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
