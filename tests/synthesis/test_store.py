"""Completions survive any failure, and damaged ones are never read."""

import json
import os
import random
import resource
import signal
import time
from contextlib import contextmanager

import pyarrow.parquet as pq
import pytest

from rayk.errors import InputError, RunFailed
from rayk.synthesis.store import CompletionStore, StoredCompletion

PROVENANCE = {
    "prompt": "2 + 2", "parameters": "{}", "seed": 2**64 - 1, "teacher": "t", "model": "m", "weights": "w",
    "written_at_seconds": 1.5,
}  # fmt: skip


def written(number, text=None):
    text = f"text {number}" if text is None else text
    return StoredCompletion(f"key-{number}", text, number, -0.5 if number % 2 else None, "stop")


@contextmanager
def opened(folder, **settings):
    with CompletionStore(folder) as store:
        store.claim(settings, {"in_flight"}, {"filters"})
        yield store


def added(folder, numbers):
    with opened(folder) as store:
        for number in numbers:
            store.add(written(number), PROVENANCE)
        store.flush()


def parts(folder):
    return sorted((folder / "completions").glob("part-*.parquet"))


def found(folder):
    with opened(folder) as store:
        return {number for number in range(1000) if store.find(f"key-{number}") == written(number)}


def in_a_child(work):
    """Run `work` in a forked process; return its id and a file with its output."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, os.fdopen(reading)
    try:
        with os.fdopen(writing, "w", buffering=1) as pipe:
            work(pipe)
    finally:
        os._exit(0)


def test_a_completion_is_found_before_and_after_it_is_on_disk(tmp_path):
    with opened(tmp_path) as store:
        assert store.find("key-1") is None
        store.add(written(1), PROVENANCE)
        assert (store.find("key-1"), store.num_pending, len(store)) == (written(1), 1, 1)
        assert not parts(tmp_path)
        store.flush()
        assert (store.find("key-1"), store.num_pending, len(store)) == (written(1), 0, 1)
    assert found(tmp_path) == {1}
    (row,) = pq.read_table(parts(tmp_path)[0]).to_pylist()
    assert row.items() >= PROVENANCE.items()
    assert row.items() >= {"key": "key-1", "text": "text 1", "tokens": 1, "finish_reason": "stop"}.items()


@pytest.mark.parametrize("damage", ["cut", "bits", "empty"])
def test_a_damaged_part_is_set_aside_and_loses_only_its_completions(tmp_path, caplog, damage):
    added(tmp_path, range(10))
    added(tmp_path, range(10, 20))
    torn = parts(tmp_path)[0]
    content = bytearray(torn.read_bytes())
    if damage == "bits":
        content[len(content) // 3] ^= 0xFF
    torn.write_bytes(content[: {"cut": len(content) // 2, "bits": None, "empty": 0}[damage]])
    assert found(tmp_path) == set(range(10, 20))
    assert f"'{torn}' is damaged" in caplog.text
    assert len(list((tmp_path / "completions").glob("*.damaged"))) == 1
    added(tmp_path, range(10))
    assert found(tmp_path) == set(range(20))


def test_files_set_aside_are_never_overwritten(tmp_path):
    for content in (b"one", b"two", b"three"):
        added(tmp_path, [1])
        parts(tmp_path)[0].write_bytes(content)
        assert found(tmp_path) == set()
    assert {each.read_bytes() for each in (tmp_path / "completions").glob("*.damaged")} == {b"one", b"two", b"three"}


def test_a_part_that_cannot_be_opened_is_not_damaged(tmp_path):
    added(tmp_path, range(10))
    (part,) = parts(tmp_path)
    hidden = part.rename(tmp_path / "elsewhere")
    part.symlink_to(part)  # a file that root cannot read either
    with pytest.raises(InputError, match=f"^'{part}' cannot be read .Too many levels of symbolic links.; make"):
        found(tmp_path)
    hidden.replace(part)
    assert found(tmp_path) == set(range(10))


def test_a_refusal_is_stored_separately_with_its_reason(tmp_path):
    refusal = StoredCompletion("key-1", "", None, None, "error", "400: no", refused=True)
    with opened(tmp_path) as store:
        store.add(refusal, PROVENANCE)
        assert store.find("key-1") == refusal
        store.add(written(2), PROVENANCE)
        store.flush()
    with opened(tmp_path) as store:
        assert (store.find("key-1"), store.num_refusals, len(store)) == (refusal, 1, 1)
    (part,) = (tmp_path / "refused").glob("part-*.parquet")
    (row,) = pq.read_table(part).to_pylist()
    assert (row["finish_reason"], row["text"]) == ("refused", "400: no")
    part.unlink()
    assert found(tmp_path) == {2}


def test_only_the_given_keys_are_flushed(tmp_path):
    with opened(tmp_path) as store:
        store.add(written(1), PROVENANCE)
        keys = store.pending_keys
        store.add(written(2), PROVENANCE)
        store.flush(keys)
        assert (store.pending_keys, len(store)) == ({"key-2"}, 2)
    assert found(tmp_path) == {1}


def test_flipped_bits_are_detected(tmp_path):
    text = "".join(chr(random.randrange(33, 127)) for _ in range(3000))
    with opened(tmp_path) as store:
        store.add(written(1, text), PROVENANCE)
        store.flush()
    (part,) = parts(tmp_path)
    content = part.read_bytes()
    outcomes = set()
    for position in range(0, len(content), len(content) // 60):
        part.write_bytes(content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :])
        with opened(tmp_path) as store:
            outcomes.add(store.find("key-1"))
    assert outcomes == {None, written(1, text)}


def test_unfinished_files_are_not_read(tmp_path):
    added(tmp_path, [1])
    unfinished = tmp_path / "completions" / "part-000009-x.parquet.unfinished"
    unfinished.write_bytes(parts(tmp_path)[0].read_bytes())
    assert found(tmp_path) == {1}
    assert not unfinished.exists()


def test_a_kill_loses_no_flushed_completion(tmp_path):
    def work(pipe):
        with opened(tmp_path) as store:
            for number in range(1000):
                store.add(written(number), PROVENANCE)
                store.flush()
                pipe.write(f"{number}\n")

    child, pipe = in_a_child(work)
    lines = [int(pipe.readline()) for _ in range(5)]
    time.sleep(random.random() * 0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    lines += [int(line) for line in pipe]
    there = found(tmp_path)
    assert there >= set(lines)
    assert there == set(range(len(there)))
    assert len(there) < 1000, "it was over before it was killed"


def test_a_second_process_is_refused_until_the_first_ends(tmp_path):
    def work(pipe):
        with opened(tmp_path):
            pipe.write("open\n")
            signal.pause()

    child, pipe = in_a_child(work)
    assert pipe.readline() == "open\n"
    with pytest.raises(InputError, match=f"^Another process is writing into '{tmp_path}'; wait"), opened(tmp_path):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with opened(tmp_path):
        pass


def test_a_full_disk_is_reported_and_leaves_no_partial_file(tmp_path):
    added(tmp_path, [1])

    def work(pipe):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with opened(tmp_path) as store:
            store.add(written(2, random.randbytes(100_000).hex()), PROVENANCE)
            try:
                store.flush()
            except RunFailed as error:
                pipe.write(f"{error}\n")
            pipe.write(f"{store.find('key-2') is not None}\n")

    child, pipe = in_a_child(work)
    lines = pipe.read().splitlines()
    os.waitpid(child, 0)
    full = tmp_path / "completions"
    assert lines[0].startswith(f"There is no space left in '{full}' (File too large); earlier files are kept.")
    assert lines[1] == "True"  # it is still pending and can be written later
    assert found(tmp_path) == {1}
    assert not list(tmp_path.rglob("*.unfinished"))


def test_another_setting_is_refused_by_its_name(tmp_path):
    with opened(tmp_path, seed=1, sampling={"temperature": 0.7, "stop": ["a"]}, in_flight=4):
        pass
    for changed, name in [
        ({"seed": 2}, "seed"),
        ({"sampling": {"temperature": 0.8, "stop": ["a"]}}, "sampling.temperature"),
        ({"sampling": {"temperature": 0.7, "stop": []}}, "sampling.stop"),
    ]:
        store = CompletionStore(tmp_path)
        with store, pytest.raises(InputError, match=f"were generated with another '{name}'"):
            store.claim({"seed": 1, "sampling": {"temperature": 0.7, "stop": ["a"]}} | changed, {"in_flight"}, set())
    with opened(tmp_path, seed=1, sampling={"temperature": 0.7, "stop": ["a"]}, in_flight=8):
        pass


def test_other_filters_make_the_rows_again_and_nothing_else(tmp_path):
    with opened(tmp_path, filters=["a"], in_flight=1) as store:
        store.add(written(1), PROVENANCE)
        store.flush()
        store.write_rows([{"prompt": "p"}], [])
        store.write_summary({"kept": 1})
    with opened(tmp_path, filters=["a"], in_flight=2) as store:
        assert store.summary == {"kept": 1}
    with opened(tmp_path, filters=["b"], in_flight=2) as store:
        assert store.summary is None
        assert store.find("key-1") == written(1)


def test_a_damaged_summary_makes_the_rows_again_and_damaged_settings_are_reported(tmp_path):
    with opened(tmp_path) as store:
        store.write_rows([{"prompt": "p"}], [])
        store.write_summary({"kept": 1})
        (tmp_path / "summary.json").write_text('{"kept"')
        assert store.summary is None
    (tmp_path / "settings.yaml").write_text("a: [")
    with pytest.raises(InputError, match=f"^'{tmp_path}/settings.yaml' cannot be read, so"), opened(tmp_path):
        pass


def test_many_small_parts_become_one(tmp_path):
    with opened(tmp_path) as store:
        for number in range(70):
            store.add(written(number), PROVENANCE)
            store.flush()
    assert len(parts(tmp_path)) == 70
    assert found(tmp_path) == set(range(70))
    assert len(parts(tmp_path)) == 1
    assert found(tmp_path) == set(range(70))


def test_columns_keep_their_type_and_mixed_ones_become_text(tmp_path):
    rows = [{"prompt": "a", "level": 1, "answer": 4}, {"prompt": "b", "level": None, "answer": "four", "more": [1, 2]}]
    with opened(tmp_path) as store:
        store.write_rows(rows, [])
        assert store.summary is None
        assert pq.read_table(store.rows_path).to_pylist() == [
            {"prompt": "a", "level": 1, "answer": "4", "more": None},
            {"prompt": "b", "level": None, "answer": "four", "more": [1, 2]},
        ]
        assert pq.read_table(tmp_path / "rejected.parquet").num_rows == 0
        store.write_summary({"kept": 2})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"kept": 2}


def test_values_without_a_parquet_type_become_json(tmp_path):
    with opened(tmp_path) as store:
        store.write_rows([{"prompt": "a", "metadata": {}, "number": 1 << 63, "half": "\ud83d"}], [])
        (row,) = pq.read_table(store.rows_path).to_pylist()
    assert row == {"prompt": "a", "metadata": "{}", "number": str(1 << 63), "half": '"\\ud83d"'}


def test_a_folder_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "synthesis"
    with pytest.raises(InputError, match=f"^'{folder}' cannot be written"), opened(folder):
        pass
