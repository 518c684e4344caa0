"""The signal cache: what a teacher has once said of a sequence is kept on disk and not asked again.

An entry's key is a hash of all that the signal depends on: the sequence's ids and counted positions, the teacher's
weights and tokenizer, the engine and its dtype, the support with its parameters, and the codec's version. What the loss
makes of a signal (divergence, a temperature the support names) is not among it. Storing rounds (`rayk.signals.codec`),
so a stored signal is learned from in its decoded form even when it has just been asked for: a run with a warm cache
equals the cold one bit for bit.
"""

import hashlib
import json
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
from rayk.storage.segments import INDEX_BYTES, KEY_BYTES, CacheStatistics, SegmentStore


class SignalCache:
    """Signals of all teachers and supports, in one folder or URI that any number of processes share.

    Used as a context it writes what is left at the end; else call `flush`.

    Raises:
        InputError: the place cannot be used.
    """

    def __init__(self, settings: CacheConfig):
        limit = settings.max_gigabytes
        self._store = SegmentStore(settings.path, None if limit is None else int(limit * 1e9))
        self.bytes = 0
        """What the signals found and added so far take on disk."""

    def __enter__(self) -> "SignalCache":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.flush()

    def find(self, teacher: EngineInfo, sequences: Sequence[TokenSequence], support: Support) -> dict[int, SignalBatch]:
        """The signals there are, by the place of their sequence."""
        keys = _keys(teacher, sequences, support)
        entries = self._store.read(keys)
        self.bytes += sum(len(entry) + INDEX_BYTES for entry in entries.values())
        return {row: unpack(entries[key], support) for row, key in enumerate(keys) if key in entries}

    def add(self, teacher: EngineInfo, sequences: Sequence[TokenSequence], signals: SignalBatch) -> list[SignalBatch]:
        """Keep the `signals` of `sequences`.

        Returns:
            what is kept of each sequence, as `find` will give it.
        """
        keys = _keys(teacher, sequences, signals.support)
        kept = self._store.add(dict(zip(keys, pack(signals), strict=True)))
        self.bytes += sum(len(entry) + INDEX_BYTES for entry in kept.values())
        return [unpack(kept[key], signals.support) for key in keys]

    def flush(self) -> None:
        """Write what is not yet written."""
        self._store.flush()

    def verify(self) -> CacheStatistics:
        """Read all of it, and delete segments that are damaged."""
        return self._store.verify()


def open_cache(settings: CacheConfig | None) -> AbstractContextManager[SignalCache | None]:
    """The cache of these settings; None where there are none."""
    return nullcontext() if settings is None else SignalCache(settings)


def check_cacheable(teacher: EngineInfo) -> None:
    """See that a key can be made for what `teacher` says.

    Raises:
        InputError: the engine does not know its weights.
    """
    if not teacher.weights_fingerprint:
        raise InputError(
            f"The signals of '{teacher.model}' cannot be cached, since it does not say which weights it holds; remove "
            "'cache', or give the teacher's model as a local folder."
        )


def _keys(teacher: EngineInfo, sequences: Sequence[TokenSequence], support: Support) -> list[bytes]:
    context = [
        CODEC_VERSION, teacher.weights_fingerprint, teacher.tokenizer_fingerprint, teacher.vocab_size, teacher.engine,
        teacher.dtype, asdict(support),
    ]  # fmt: skip
    common = hashlib.blake2b(json.dumps(context, sort_keys=True).encode(), digest_size=KEY_BYTES)
    keys = []
    for sequence in sequences:
        own = common.copy()
        own.update(len(sequence).to_bytes(8, "little"))
        own.update(sequence.input_ids.astype("<i4").tobytes())
        own.update(np.packbits(sequence.counted).tobytes())
        keys.append(own.digest())
    return keys
