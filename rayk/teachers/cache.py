"""The signal cache: it stores a teacher's signals on disk, so that each is requested only once.

An entry's key is a hash of everything that the signal depends on: the sequence's ids and counted positions, the
teacher's weights and tokenizer, the engine and its dtype, the support with its parameters, and the codec's version. It
does not depend on the use of the signal in a loss (divergence, a temperature of the support). Storing rounds
(`rayk.signals.codec`), so a new signal is used in its decoded form, too: a run with a warm cache equals one with a cold
cache bit for bit.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from types import TracebackType

import numpy as np

from rayk.config import CacheConfig
from rayk.config.support import Support
from rayk.engines.base import EngineInfo
from rayk.errors import InputError
from rayk.signals.batch import SignalBatch
from rayk.signals.codec import CODEC_VERSION, pack, unpack
from rayk.signals.sequence import TokenSequence
from rayk.signals.wire import CorruptSignal
from rayk.storage.segments import INDEX_BYTES, KEY_BYTES, CacheStatistics, SegmentStore

logger = logging.getLogger(__name__)


class SignalCache:
    """Signals of all teachers and supports, in a folder or at a URI that any number of processes share.

    On exit as a context manager it writes the signals that are only in memory; otherwise call `flush`.

    Raises:
        InputError: the folder or URI cannot be used.
    """

    def __init__(self, settings: CacheConfig):
        limit = settings.max_gigabytes
        self._store = SegmentStore(settings.path, None if limit is None else int(limit * 1e9))
        self.bytes = 0
        """Size on disk of the signals found and added so far."""

    def __enter__(self) -> "SignalCache":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.flush()

    def find(self, teacher: EngineInfo, sequences: Sequence[TokenSequence], support: Support) -> dict[int, SignalBatch]:
        """Return the cached signals, by the index of their sequence in `sequences`. An entry without a usable signal of
        its sequence counts as missing."""
        keys = _keys(teacher, sequences, support)
        entries = self._store.read(keys)
        self.bytes += sum(len(entry) + INDEX_BYTES for entry in entries.values())
        found = {}
        for row, key in enumerate(keys):
            if key in entries:
                try:
                    found[row] = _unpack(entries[key], support, teacher, sequences[row])
                except CorruptSignal as error:
                    logger.warning(
                        "A signal in the cache '%s' is requested again: %s If this is not the only one, delete the "
                        "cache; someone else may have written to it.", self._store.place, error,
                    )  # fmt: skip
        return found

    def add(self, teacher: EngineInfo, sequences: Sequence[TokenSequence], signals: SignalBatch) -> list[SignalBatch]:
        """Store the `signals` of `sequences`.

        Returns:
            The stored signals of each sequence, as `find` returns them.
        """
        keys = _keys(teacher, sequences, signals.support)
        new = dict(zip(keys, pack(signals), strict=True))
        stored = self._store.add(new)
        self.bytes += sum(len(entry) + INDEX_BYTES for entry in stored.values())

        def unpack_stored(key: bytes, sequence: TokenSequence) -> SignalBatch:
            try:
                return _unpack(stored[key], signals.support, teacher, sequence)
            except CorruptSignal:  # `find` has warned of it
                return _unpack(new[key], signals.support, teacher, sequence)

        return [unpack_stored(key, sequence) for key, sequence in zip(keys, sequences, strict=True)]

    def flush(self) -> None:
        """Write the signals that are only in memory."""
        self._store.flush()

    def verify(self) -> CacheStatistics:
        """Read all signals and delete damaged segments."""
        return self._store.verify()


def open_cache(settings: CacheConfig | None) -> AbstractContextManager[SignalCache | None]:
    """Open the cache of these settings; yield None without settings."""
    return nullcontext() if settings is None else SignalCache(settings)


def check_cacheable(teacher: EngineInfo) -> None:
    """Check that the teacher's weights are known, as the keys of the cache require.

    Raises:
        InputError: the engine reports no fingerprint of its weights.
    """
    if not teacher.weights_fingerprint:
        raise InputError(
            f"The signals of '{teacher.model}' cannot be cached, because its weights are unknown; remove "
            "'cache', or give the teacher's model as a local folder."
        )


def _unpack(entry: bytes, support: Support, teacher: EngineInfo, sequence: TokenSequence) -> SignalBatch:
    """Return the signal in an entry.

    Raises:
        CorruptSignal: it contains none of this teacher for this sequence.
    """
    signals = unpack(entry, support, sequence.counted_tokens, teacher.hidden_size)
    if signals.vocab_size != teacher.vocab_size:
        raise CorruptSignal(f"An entry has a vocabulary of {signals.vocab_size}, the teacher of {teacher.vocab_size}.")
    return signals


def _keys(teacher: EngineInfo, sequences: Sequence[TokenSequence], support: Support) -> list[bytes]:
    context = [
        CODEC_VERSION, teacher.weights_fingerprint, teacher.tokenizer_fingerprint, teacher.vocab_size, teacher.engine,
        teacher.dtype, asdict(support),
    ]  # fmt: skip
    common = hashlib.blake2b(json.dumps(context, sort_keys=True).encode(), digest_size=KEY_BYTES)
    keys = []
    for sequence in sequences:
        key = common.copy()
        key.update(len(sequence).to_bytes(8, "little"))
        key.update(sequence.input_ids.astype("<i4").tobytes())
        key.update(np.packbits(sequence.counted).tobytes())
        keys.append(key.digest())
    return keys
