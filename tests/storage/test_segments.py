"""The cache's files under many writers, kills, damage and a limit: never a wrong entry, at worst a missing one."""

import hashlib
import logging
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from rayk.errors import InputError
from rayk.storage import segments as store_module
from rayk.storage.segments import KEY_BYTES, SegmentStore
from tests.fuzz.limits import bounded_memory
from tests.runs import environment, wait_until


def key_of(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=KEY_BYTES).digest()


def entry_of(number: int, size: int = 400) -> bytes:
    return np.random.default_rng(number).bytes(1 + number % size)


def entries_of(*numbers: int) -> dict[bytes, bytes]:
    return {key_of(number): entry_of(number) for number in numbers}


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.rks"), key=lambda path: path.stat().st_mtime_ns)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def filled(folder):
    """A folder with one segment of twenty entries."""
    store = SegmentStore(str(folder))
    store.add(entries_of(*range(20)))
    store.flush()
    return folder


def test_added_entries_are_found_before_and_after_they_are_written(folder):
    store, entries = SegmentStore(str(folder)), entries_of(1, 2, 3)
    assert store.read(entries) == {}
    assert store.add(entries) == entries
    assert not segments(folder)
    assert store.read([*entries, key_of(4)]) == entries
    store.flush()
    store.flush()
    assert len(segments(folder)) == 1
    assert store.read(entries) == SegmentStore(str(folder)).read(entries) == entries


@pytest.mark.slow
def test_open_store_finds_segments_of_other_writers(filled):
    store = SegmentStore(str(filled))
    assert len(store.read(entries_of(*range(20)))) == 20
    other = SegmentStore(str(filled))
    other.add(entries_of(50))
    other.flush()
    wait_until(lambda: store.read([key_of(50)]) == entries_of(50), "the other's segment")


def test_first_entry_of_a_key_stays(folder):
    store = SegmentStore(str(folder))
    [key] = entries_of(1)
    store.add({key: b"first"})
    assert store.add({key: b"second"}) == {key: b"first"}
    store.flush()
    assert store.add({key: b"third"}) == {key: b"first"}
    assert SegmentStore(str(folder)).add({key: b"fourth"}) == {key: b"first"}


def test_large_entries_are_written_without_a_flush(folder):
    store = SegmentStore(str(folder), max_bytes=40_000)
    for number in range(0, 200, 10):
        store.add(entries_of(*range(number, number + 10)))
    assert len(segments(folder)) >= 2


def test_every_file_system_of_pyarrow_is_supported(folder):
    store = SegmentStore(f"file://{folder}")
    store.add(entries_of(1))
    store.flush()
    assert SegmentStore(str(folder)).read(entries_of(1)) == entries_of(1)
    in_memory = SegmentStore("mock://cache")  # written in one upload, as to an object store
    assert in_memory.add(entries_of(1, 2)) == entries_of(1, 2)
    in_memory.flush()
    assert in_memory.read(entries_of(1, 2, 3)) == entries_of(1, 2)
    assert (in_memory.verify().entries, in_memory.verify().damaged) == (2, [])
    for place in (f"{segments(folder)[0]}/below", "nothing://there"):
        with pytest.raises(InputError, match="cannot be used"):
            SegmentStore(place)


def test_flipped_bits_and_truncation_are_misses(filled):
    [path] = segments(filled)
    whole, entries = path.read_bytes(), entries_of(*range(20))
    random = np.random.default_rng(0)
    missed = 0
    for position in random.integers(0, len(whole), 150):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << random.integers(8)
        for data in (damaged, whole[:position]):
            path.write_bytes(data)
            found = SegmentStore(str(filled)).read(entries)
            assert found.items() <= entries.items()
            missed += found != entries
    assert missed == 300
    store = SegmentStore(str(filled))
    assert store.add(entries) == entries
    store.flush()
    assert store.read(entries) == SegmentStore(str(filled)).read(entries) == entries


def test_damage_is_logged_once_and_other_segments_are_read(filled, caplog):
    store = SegmentStore(str(filled))
    store.add(entries_of(30, 31))
    store.flush()
    harmed, _ = segments(filled)
    harmed.write_bytes(bytes([harmed.read_bytes()[0] ^ 1]) + harmed.read_bytes()[1:])
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert store.read(entries_of(0, 1, 30)) == entries_of(30)
    [said] = caplog.messages
    assert harmed.name in said and "is damaged" in said


def test_verify_counts_intact_segments_and_deletes_damaged_ones(filled):
    store = SegmentStore(str(filled))
    store.add(entries_of(30, 31))
    store.flush()
    left = filled / "0.rks.1.part"
    left.write_bytes(b"cut off")
    size = sum(path.stat().st_size for path in segments(filled))
    found = store.verify()
    assert (found.segments, found.entries, found.bytes, found.damaged) == (2, 22, size, [])
    assert left.exists(), "it may be under way"
    os.utime(left, (0, 0))
    harmed, _ = segments(filled)
    harmed.write_bytes(harmed.read_bytes()[:-1])
    found = SegmentStore(str(filled)).verify()
    assert (found.segments, found.entries, found.damaged) == (1, 2, [harmed.name])
    assert not harmed.exists() and not left.exists()
    assert SegmentStore(str(filled)).verify().damaged == []


def test_least_recently_used_segment_is_deleted(folder):
    writer = SegmentStore(str(folder))
    for number in range(3):
        writer.add({key_of(number): bytes(3_000)})
        writer.flush()
    time.sleep(0.05)  # file systems tell times apart by some milliseconds
    reader = SegmentStore(str(folder))
    assert len(reader.read([key_of(0)])) == 1  # used later than the others were written
    limited = SegmentStore(str(folder), max_bytes=7_000)
    limited.add({key_of(3): bytes(1_500)})
    limited.flush()
    assert len(segments(folder)) == 2
    for store in (reader, writer, SegmentStore(str(folder))):
        assert set(store.read(key_of(n) for n in range(4))) >= {key_of(0)}
        assert not set(store.read(key_of(n) for n in range(4))) & {key_of(1), key_of(2)}
    limited.add({key_of(1): bytes(1_000)})
    limited.flush()
    assert len(SegmentStore(str(folder)).read(key_of(n) for n in range(4))) == 3


def test_unwritable_disk_is_a_warning(filled, caplog):
    store = SegmentStore(str(filled))
    filled.rename(filled.with_name("away"))
    filled.write_text("a file in its place")
    assert store.add(entries_of(40)) == entries_of(40)
    store.flush()
    assert "cannot be listed" in caplog.text and "cannot be written" in caplog.text
    assert store.read(entries_of(0, 40)) == {}


def rewrite_index(path: Path, change, magic: bytes = b"RKC2") -> None:
    """Change the records of a segment's index (key, offset, length, checksum), and renew the index's checksum."""
    data = path.read_bytes()
    count = int.from_bytes(data[-16:-8], "little")
    index = np.frombuffer(data[-16 - 36 * count : -16], store_module._INDEX).copy()
    change(index, data)
    footer = data[-16:-8] + zlib.crc32(index.tobytes()).to_bytes(4, "little") + magic
    path.write_bytes(data[: -16 - 36 * count] + index.tobytes() + footer)


def exchange_keys(index, _data):
    index["key"][:2] = index["key"][[1, 0]]


def empty_entry(index, _data):
    index["length"][0], index["checksum"][0] = 0, 0


@pytest.mark.parametrize("change", [exchange_keys, empty_entry])
def test_an_entry_under_another_key_is_a_miss(filled, change):
    rewrite_index(segments(filled)[0], change)
    entries = entries_of(*range(20))
    assert SegmentStore(str(filled)).read(entries).items() <= entries.items()
    assert len(SegmentStore(str(filled)).verify().damaged) == 1


@pytest.mark.parametrize(("field", "number"), [("offset", 2**64 - 1), ("offset", 2**63), ("length", 2**32 - 1)])
def test_places_outside_of_a_segment_are_damage(filled, field, number):
    def move(index, _data):
        index[field][3] = number

    rewrite_index(segments(filled)[0], move)
    with bounded_memory():
        assert SegmentStore(str(filled)).read(entries_of(3, 4)) == {}
        assert len(SegmentStore(str(filled)).verify().damaged) == 1


def test_segments_of_rayk_0_1_are_read(filled):
    def without_keys(index, data):
        for record in index:
            record["checksum"] = zlib.crc32(data[record["offset"] : record["offset"] + record["length"]])

    rewrite_index(segments(filled)[0], without_keys, magic=b"RKC1")
    assert SegmentStore(str(filled)).read(entries_of(*range(20))) == entries_of(*range(20))


WRITER = """
import sys
from rayk.storage.segments import SegmentStore
from tests.storage.test_segments import entries_of
folder, first, last, a_segment = sys.argv[1], *map(int, sys.argv[2:])
store = SegmentStore(folder)
for number in range(first, last, 5):
    entries = entries_of(*range(number, number + 5))
    assert store.add(entries) == entries
    earlier = entries_of(*range(max(first, number - 200), number, 7))
    assert store.read(earlier) == earlier
    if number % a_segment == 0:
        store.flush()
        print(number, flush=True)
store.flush()
"""


def writer(folder: Path, first: int, last: int, a_segment: int) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, *map(str, (folder, first, last, a_segment))]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_processes_write_and_read_concurrently(folder):
    both = [writer(folder, 0, 1_500, 50), writer(folder, 1_000, 2_500, 35)]
    reader, entries = SegmentStore(str(folder)), entries_of(*range(2_500))
    while any(process.poll() is None for process in both):
        assert reader.read(entries).items() <= entries.items()
        time.sleep(0.1)
    assert [process.wait() for process in both] == [0, 0]
    assert SegmentStore(str(folder)).read(entries) == entries
    assert SegmentStore(str(folder)).verify().damaged == []


@pytest.mark.slow
def test_killed_writer_loses_only_unwritten_entries(folder):
    process = writer(folder, 0, 10_000_000, 25)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 500:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    store, entries = SegmentStore(str(folder)), entries_of(*range(505))
    assert store.read(entries) == entries
    assert store.verify().damaged == []
    more = entries_of(*range(505, 1_000))
    assert store.add(more) == more
    store.flush()
    assert SegmentStore(str(folder)).read(entries | more) == entries | more
