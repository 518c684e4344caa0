"""A key-value store in a folder that many processes of many runs read and write at the same time, without locks.

A writer collects entries and writes them as a *segment*: a file that never changes and is named after a hash of its
content. It contains the entries back to back, then an index (key, offset, length, and the checksum of key and entry),
then the index's length and checksum. A reader gets the keys from the end of a segment; each entry is then one ranged
read, both on a disk and in an object store. A segment appears as a whole (renamed from a temporary file, or uploaded at
once), so a killed writer loses only the entries of the last seconds, which it has not written yet. A damaged entry
counts as missing. No number in a segment is trusted: it must fit into the file before anything is read or allocated.

With a size limit, the least recently used segments are deleted: each segment that is read has an empty file `NAME.used`
beside it, rewritten once an hour, whose modification time is the time of use.
"""

import contextlib
import hashlib
import logging
import threading
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import fs

from rayk.config.secrets import hide
from rayk.errors import InputError
from rayk.storage.places import first_line, open_place

logger = logging.getLogger(__name__)

KEY_BYTES = 20
_SUFFIX, _USED, _PART = ".rks", ".used", ".part"
_INDEX = np.dtype([("key", f"V{KEY_BYTES}"), ("offset", "<u8"), ("length", "<u4"), ("checksum", "<u4")])
INDEX_BYTES = _INDEX.itemsize
_FOOTER = np.dtype([("entries", "<u8"), ("checksum", "<u4"), ("magic", "S4")])
_MAGIC, _MAGIC_WITHOUT_KEYS = b"RKC2", b"RKC1"
"""The format, and that of rayk 0.1, whose checksums cover the entries only."""
_SEGMENT_BYTES = 32 << 20
_FLUSH_SECONDS = 15.0
_REFRESH_SECONDS = 3.0
_MARK_SECONDS = 3600.0
_ABANDONED_SECONDS = 3600.0
_PARALLEL_READS = 8


class DamagedSegment(Exception):
    """A segment is truncated or does not match its checksums."""


class _Place(NamedTuple):
    segment: str
    offset: int
    length: int
    checksum: int
    seed: int
    """The CRC-32 of what the checksum covers before the entry: its key."""


@dataclass(frozen=True)
class CacheStatistics:
    """Numbers of intact segments, their entries and bytes; names of the damaged segments, which were deleted."""

    segments: int
    entries: int
    bytes: int
    damaged: list[str]


class SegmentStore:
    """One process's access to the segments in a folder or at a URI (s3://…, gs://…).

    Args:
        place: the folder or URI; created if it does not exist.
        max_bytes: largest size of all segments; a writer that exceeds it deletes the least recently used ones.

    Raises:
        InputError: the folder or URI cannot be used.
    """

    def __init__(self, place: str, max_bytes: int | None = None):
        self.place = hide(place)
        try:
            self._fs, self._folder = open_place(place)
            self._fs.create_dir(self._folder, recursive=True)
        except (OSError, ValueError) as error:
            raise InputError(f"The cache '{self.place}' cannot be used: {first_line(error)}.") from error
        self._max_bytes = max_bytes
        self._segment_bytes = min(_SEGMENT_BYTES, max_bytes // 8) if max_bytes else _SEGMENT_BYTES
        self._lock = threading.Lock()
        self._readers = ThreadPoolExecutor(_PARALLEL_READS, "rayk-cache")
        self._places: dict[bytes, _Place] = {}
        self._known: set[str] = set()
        self._listed = -_REFRESH_SECONDS
        self._marked: dict[str, float] = {}
        self._unwritten: dict[bytes, bytes] = {}
        self._unwritten_bytes = 0
        self._oldest_unwritten = 0.0

    def read(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        """Return the entries of those `keys` that exist."""
        wanted = set(keys)
        with self._lock:
            if any(key not in self._places and key not in self._unwritten for key in wanted):
                self._refresh()
            found = {key: self._unwritten[key] for key in wanted & self._unwritten.keys()}
            places = sorted((self._places[key], key) for key in wanted & self._places.keys() - found.keys())
        groups = [(name, list(group)) for name, group in groupby(places, key=lambda item: item[0].segment)]
        for entries in self._readers.map(lambda group: self._read_segment(*group), groups):
            found |= entries
        return found

    def add(self, entries: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
        """Add `entries`, without those whose key exists already.

        Returns:
            The stored entry of each key.
        """
        found = self.read(entries)
        with self._lock:
            if not self._unwritten:
                self._oldest_unwritten = time.monotonic()
            for key, entry in entries.items():
                if key not in found and key not in self._unwritten:
                    self._unwritten[key] = entry
                    self._unwritten_bytes += len(entry)
            stored = {key: found[key] if key in found else self._unwritten[key] for key in entries}
            overdue = time.monotonic() - self._oldest_unwritten > _FLUSH_SECONDS
            if overdue or self._unwritten_bytes >= self._segment_bytes:
                self._write()
        return stored

    def flush(self) -> None:
        """Write the entries that are only in memory."""
        with self._lock:
            self._write()

    def verify(self) -> CacheStatistics:
        """Read all segments completely; delete damaged ones and the temporary files of killed writers.

        Raises:
            InputError: a segment cannot be read, which does not mean that it is damaged.
        """
        segments = entries = size = 0
        damaged = []
        infos = {info.base_name: info for info in self._list()}
        for name, info in infos.items():
            abandoned = name.endswith(_PART) and time.time() - info.mtime.timestamp() > _ABANDONED_SECONDS
            if abandoned or (name.endswith(_USED) and name.removesuffix(_USED) not in infos):
                self._delete(name)
            if not name.endswith(_SUFFIX):
                continue
            try:
                places = self._read_index(name)
                with self._fs.open_input_file(self._path(name)) as file:
                    for place in places.values():
                        _read_entry(file, place)
            except FileNotFoundError:
                continue
            except DamagedSegment:
                damaged.append(name)
                self._delete(name)
                continue
            except OSError as error:
                raise InputError(
                    f"Segment {name} of the cache '{self.place}' cannot be read: {first_line(error)}; make it readable."
                ) from error
            segments, entries, size = segments + 1, entries + len(places), size + info.size
        return CacheStatistics(segments, entries, size, damaged)

    def _read_segment(self, name: str, wanted: list[tuple[_Place, bytes]]) -> dict[bytes, bytes]:
        try:
            with self._fs.open_input_file(self._path(name)) as file:
                entries = {key: _read_entry(file, place) for place, key in wanted}
        except FileNotFoundError:  # deleted because of the size limit
            self._forget(name)
            return {}
        except (DamagedSegment, OSError) as error:
            self._forget(name)
            self._warn(name, error)
            return {}
        self._mark_used(name)
        return entries

    def _refresh(self) -> None:
        """Read the indexes of segments that other processes have written since the last call."""
        if time.monotonic() - self._listed < _REFRESH_SECONDS:
            return
        self._listed = time.monotonic()
        try:
            names = {info.base_name for info in self._list() if info.base_name.endswith(_SUFFIX)}
        except OSError as error:
            logger.warning("The cache '%s' cannot be listed, so new segments in it are not used: %s", self.place, error)
            return
        for name in sorted(names - self._known):
            self._known.add(name)
            try:
                for key, place in self._read_index(name).items():
                    self._places.setdefault(key, place)
            except FileNotFoundError:
                continue
            except (DamagedSegment, OSError) as error:
                self._warn(name, error)

    def _read_index(self, name: str) -> dict[bytes, _Place]:
        with self._fs.open_input_file(self._path(name)) as file:
            size = file.size()
            footer = _read_records(file, size - _FOOTER.itemsize, 1, _FOOTER)[0]
            start = size - _FOOTER.itemsize - int(footer["entries"]) * _INDEX.itemsize
            if footer["magic"] not in (_MAGIC, _MAGIC_WITHOUT_KEYS) or start < 0:
                raise DamagedSegment("it has no index")
            index = _read_records(file, start, int(footer["entries"]), _INDEX)
        if zlib.crc32(index.tobytes()) != footer["checksum"]:
            raise DamagedSegment("its index does not match the checksum")
        if (index["offset"] > start).any() or (index["length"] > start - index["offset"]).any():
            raise DamagedSegment("its index names places outside of it")
        return _index_places(name, index, covers_keys=footer["magic"] == _MAGIC)

    def _write(self) -> None:
        if not self._unwritten:
            return
        entries = list(self._unwritten.items())
        index = np.zeros(len(entries), _INDEX)
        index["key"] = np.array([key for key, _ in entries], f"V{KEY_BYTES}")
        index["length"] = [len(entry) for _, entry in entries]
        index["offset"] = np.cumsum(index["length"], dtype=np.uint64) - index["length"]
        index["checksum"] = [zlib.crc32(entry, zlib.crc32(key)) for key, entry in entries]
        footer = np.array([(len(entries), zlib.crc32(index.tobytes()), _MAGIC)], _FOOTER)
        data = b"".join([*(entry for _, entry in entries), index.tobytes(), footer.tobytes()])
        name = hashlib.blake2b(data, digest_size=16).hexdigest() + _SUFFIX
        try:
            self._put(name, data)
            self._known.add(name)
            self._places |= _index_places(name, index, covers_keys=True)
            if self._max_bytes is not None:
                self._evict(self._max_bytes)
        except OSError as error:
            logger.warning("The cache '%s' cannot be written, so some signals are not cached: %s", self.place, error)
        # Also after an error: otherwise the memory would grow without limit, and a run does not depend on the cache.
        self._unwritten, self._unwritten_bytes = {}, 0

    def _put(self, name: str, data: bytes) -> None:
        if not isinstance(self._fs, fs.LocalFileSystem):
            self._write_file(name, data)
            return
        part = f"{name}.{uuid.uuid4().hex}{_PART}"
        try:
            self._write_file(part, data)
            self._fs.move(self._path(part), self._path(name))
        except OSError:
            with contextlib.suppress(OSError):  # do not leave half a segment on a full disk
                self._fs.delete_file(self._path(part))
            raise

    def _write_file(self, name: str, data: bytes) -> None:
        with self._fs.open_output_stream(self._path(name)) as stream:
            stream.write(data)

    def _evict(self, max_bytes: int) -> None:
        infos = {info.base_name: info for info in self._list()}
        segments = [info for name, info in infos.items() if name.endswith(_SUFFIX)]

        def last_used(info: fs.FileInfo) -> float:
            mark = infos.get(info.base_name + _USED)
            return max(file.mtime.timestamp() for file in (info, mark) if file is not None)

        excess = sum(info.size for info in segments) - max_bytes
        for info in sorted(segments, key=last_used):
            if excess <= 0:
                return
            self._delete(info.base_name)
            excess -= info.size

    def _mark_used(self, name: str) -> None:
        now = time.monotonic()
        if now - self._marked.get(name, -_MARK_SECONDS) < _MARK_SECONDS:
            return
        self._marked[name] = now
        with contextlib.suppress(OSError):  # such as in a read-only cache
            self._write_file(name + _USED, b"")

    def _forget(self, name: str) -> None:
        with self._lock:
            self._places = {key: place for key, place in self._places.items() if place.segment != name}

    def _warn(self, name: str, error: Exception) -> None:
        logger.warning(
            "Segment %s of the cache '%s' is damaged (%s): its signals are requested again. `rayk cache CONFIG "
            "--verify` deletes damaged segments.", name, self.place, str(error).splitlines()[0],
        )  # fmt: skip

    def _delete(self, name: str) -> None:
        for file in (name, name + _USED):
            with contextlib.suppress(FileNotFoundError):  # another process has deleted it
                self._fs.delete_file(self._path(file))

    def _list(self) -> Iterator[fs.FileInfo]:
        infos = self._fs.get_file_info(fs.FileSelector(self._folder, allow_not_found=True))
        return (info for info in infos if info.is_file)

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}"


def _index_places(name: str, index: np.ndarray, *, covers_keys: bool) -> dict[bytes, _Place]:
    return {
        key: _Place(name, offset, length, checksum, zlib.crc32(key) if covers_keys else 0)
        for key, offset, length, checksum in index.tolist()
    }


def _read_entry(file: pa.NativeFile, place: _Place) -> bytes:
    entry = file.read_at(place.length, place.offset)
    if zlib.crc32(entry, place.seed) != place.checksum:
        raise DamagedSegment("an entry does not match its checksum")
    return entry


def _read_records(file: pa.NativeFile, offset: int, count: int, dtype: np.dtype) -> np.ndarray:
    if offset < 0:
        raise DamagedSegment("it is truncated")
    data = file.read_at(count * dtype.itemsize, offset)
    if len(data) < count * dtype.itemsize:
        raise DamagedSegment("it is truncated")
    return np.frombuffer(data, dtype)
