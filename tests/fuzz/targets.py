"""The readers that are given damaged and hostile inputs.

A target makes an input from a random generator, and reads it; `refusals` are the errors with which the reader may
refuse it. Where a reader accepts an input, the target also uses the result as the library does.
"""

import gzip
import io
import json
import os
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from rayk.commands.status import status
from rayk.config import CacheConfig, DataSource, load_config, with_absolute_paths
from rayk.config.marks import all_places
from rayk.config.run import RunConfig
from rayk.config.support import Hidden, Layers, Logprob, Requested, Sampled, Support, TopK
from rayk.data.row_texts import RowTexts
from rayk.data.sources import read_rows
from rayk.engines.base import EngineInfo
from rayk.errors import InputError
from rayk.signals.batch import SignalBatch
from rayk.signals.codec import pack, unpack
from rayk.signals.sequence import TokenSequence
from rayk.signals.wire import CorruptSignal, decode, encode
from rayk.storage import segments
from rayk.storage.segments import SegmentStore
from rayk.storage.tensor_files import DamagedFile, TensorFile
from rayk.storage.values import join_tensors
from rayk.teachers.cache import SignalCache
from tests.fuzz.mutations import change_bytes, change_text, change_values
from tests.report.test_report import make_run
from tests.signals.test_batch import logits_of, signals_of
from tests.signals.test_layer_signals import signals_of as signals_of_layers

JOBS = Path(__file__).parents[2] / "jobs"
SUPPORTS: tuple[Support, ...] = (
    TopK(4), TopK(3, (1.0, 2.0)), Logprob(), Sampled(7), Sampled(5, tau=0.8, seed=3), Hidden(), Hidden("float32"),
)  # fmt: skip
LAYERS = (Layers(2), Layers((1, 4, 1), "float16", "float16"), Layers(1, "float32", "float32", "attention"))
RENEWED_SHARE = 0.85
"""Share of the inputs whose checksums are made to fit again, so that what they protect is reached."""


class Target(ABC):
    """A reader and its inputs."""

    name: str
    share: int
    """Number of inputs in proportion to those of other targets; fast readers have more."""
    refusals: tuple[type[Exception], ...]

    def __init__(self, folder: Path):
        """
        Args:
            folder: an empty folder, the current one while the target runs.
        """
        self.folder = folder

    @abstractmethod
    def make(self, random: Random) -> Any:
        """Return an input."""

    @abstractmethod
    def read(self, given: Any) -> None:
        """Read an input and use the result.

        Raises:
            Exception: one of `refusals`; anything else is a miss.
        """


class Wire(Target):
    """Replies of teachers: `rayk.signals.wire.decode`."""

    name, share, refusals = "wire", 600, (CorruptSignal,)

    def __init__(self, folder: Path):
        super().__init__(folder)
        supports = (*SUPPORTS, Requested(2), Requested(0))
        self._valid = [
            encode(signals_of(logits_of(sum(lengths), vocab, 3.0), support, lengths)).tobytes()
            for support in supports for lengths in ([3, 0, 2], [1]) for vocab in (30, 70_000)
        ]  # fmt: skip
        self._valid += [encode(signals_of_layers(support, 4, 5)[1]).tobytes() for support in LAYERS]

    def make(self, random: Random) -> bytes:
        data = change_bytes(random, random.choice(self._valid), self._valid)
        if random.random() < 0.3:  # one number of the header
            place = 8 + 4 * random.randrange(10)
            number = random.choice((0, 1, 2, 5, 255, 256, 2**20, 200_000_000, 2**31, 2**32 - 1))
            data = data[:place] + struct.pack("<I", number) + data[place + 4 :]
        if random.random() < RENEWED_SHARE:
            data = b"RKS1" + struct.pack("<I", zlib.crc32(data[8:])) + data[8:]
        return data

    def read(self, given: bytes) -> None:
        use_signals(decode(given))


class Entries(Target):
    """Entries of the signal cache, behind their checksums: `rayk.signals.codec.unpack`."""

    name, share, refusals = "entries", 240, (CorruptSignal,)

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._valid = [
            (entry, support)
            for support in SUPPORTS for vocab in (30, 70_000)
            for entry in pack(signals_of(logits_of(6, vocab, 3.0), support, [6]))
        ]  # fmt: skip
        for support in LAYERS:
            [entry] = pack(signals_of_layers(support, 6, 5)[1].slice_tokens(slice(0, 6)))
            self._valid.append((entry, support))

    def make(self, random: Random) -> tuple[bytes, Support]:
        entry, support = random.choice(self._valid)
        if random.random() < 0.1:
            support = random.choice((*SUPPORTS, *LAYERS))
        return change_bytes(random, entry, [entry for entry, _ in self._valid]), support

    def read(self, given: tuple[bytes, Support]) -> None:
        signals = unpack(*given, tokens=6, hidden_size=5)
        assert signals.tokens == 6 and not signals.invalid_rows()
        use_signals(signals)


class Segments(Target):
    """Files of the signal cache: a lookup never fails, and `rayk cache --verify` deletes what is damaged."""

    name, share, refusals = "segments", 20, ()

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._teacher = EngineInfo("m", 30, 99, "t", "float32", "cpu", ("topk", "logprob"), 5, weights_fingerprint="w")
        self._sequences = [TokenSequence(np.arange(n, dtype="i4"), np.arange(n) > 1) for n in (4, 5, 9)]
        cache = SignalCache(CacheConfig(path=str(folder / "valid")))
        for support in (TopK(4), Logprob()):
            lengths = [sequence.counted_tokens for sequence in self._sequences]
            cache.add(self._teacher, self._sequences, signals_of(logits_of(sum(lengths), 30, 3.0), support, lengths))
        cache.flush()
        [path] = (folder / "valid").glob("*.rks")
        self._valid, self._place = path.read_bytes(), folder / "cache"
        self._place.mkdir()

    def make(self, random: Random) -> bytes:
        data = self._valid
        if random.random() < 0.3:
            return change_bytes(random, data)
        footer, record = segments._FOOTER.itemsize, segments._INDEX.itemsize
        start = len(data) - footer - 6 * record
        entries, index, end = data[:start], bytearray(data[start:-footer]), bytearray(data[-footer:])
        if random.random() < 0.4:
            entries = change_bytes(random, entries)
        else:
            index = bytearray(change_bytes(random, bytes(index)))
        if random.random() < 0.2:
            end[:8] = struct.pack("<Q", random.choice((0, 1, 5, 7, 2**32, 2**63, 2**64 - 1)))
        if random.random() < RENEWED_SHARE:
            _renew_checksums(entries, index)
            end[8:12] = struct.pack("<I", zlib.crc32(bytes(index)))
        return entries + bytes(index) + bytes(end)

    def read(self, given: bytes) -> None:
        path = self._place / "0.rks"
        path.write_bytes(given)
        cache = SignalCache(CacheConfig(path=str(self._place)))
        for support in (TopK(4), Logprob()):
            for row, signals in cache.find(self._teacher, self._sequences, support).items():
                assert signals.tokens == self._sequences[row].counted_tokens
        found = SegmentStore(str(self._place)).verify()
        assert path.exists() == (not found.damaged)


def _renew_checksums(entries: bytes, index: bytearray) -> None:
    """Make the checksums of those records of an index fit that name a place inside of `entries`."""
    record = segments._INDEX.itemsize
    for place in range(0, len(index) - record + 1, record):
        key = bytes(index[place : place + segments.KEY_BYTES])
        offset, length = struct.unpack_from("<QI", index, place + segments.KEY_BYTES)
        if offset + length <= len(entries):
            crc = zlib.crc32(entries[offset : offset + length], zlib.crc32(key))
            struct.pack_into("<I", index, place + segments.KEY_BYTES + 12, crc)


class Tensors(Target):
    """Files of checkpoints: `rayk.storage.tensor_files.TensorFile`, and the values stored beside the tensors."""

    name, share, refusals = "tensors", 80, (DamagedFile,)

    def __init__(self, folder: Path):
        super().__init__(folder)
        from rayk.storage.tensor_files import write_tensors

        tensors = {"a": torch.randn(3, 2), "b": torch.arange(4), "c": torch.zeros(0, 3), "d": torch.tensor(1.0)}
        file_system = pa.fs.LocalFileSystem()
        write_tensors(file_system, str(folder / "valid"), list(tensors.items()), {"values": '{"$": "tensor"}'})
        data = (folder / "valid").read_bytes()
        size = int.from_bytes(data[:8], "little")
        self._valid, self._header, self._body = data, json.loads(data[8 : 8 + size]), data[8 + size :]

    def make(self, random: Random) -> bytes:
        if random.random() < 0.4:
            return change_bytes(random, self._valid)
        header = json.dumps(change_values(random, self._header, ("dtype", "shape", "data_offsets")))
        head = header.encode("utf-8", "surrogatepass")
        return len(head).to_bytes(8, "little") + head + self._body

    def read(self, given: bytes) -> None:
        file = TensorFile(pa.BufferReader(given))
        for name in file.tensors:
            file.read(name)


class Values(Target):
    """The JSON values of checkpoints: `rayk.storage.values.join_tensors`."""

    name, share, refusals = "values", 28, (ValueError, KeyError, TypeError)

    def make(self, random: Random) -> Any:
        valid = {
            "a": {"$": "tensor", "value": "0"}, "b": {"$": "tuple", "value": [1, {"$": "bytes", "value": "YWI="}]},
            "c": {"$": "dict", "value": [[{"$": "tuple", "value": [1, 2]}, {"$": "set", "value": [1, 2]}]]},
        }  # fmt: skip
        return change_values(random, valid, ("$", "value"))

    def read(self, given: Any) -> None:
        join_tensors(given, {"0": torch.zeros(2)})


class Configs(Target):
    """Config files and `--set`: `rayk.config.load_config`, and what every run does with the settings next."""

    name, share, refusals = "configs", 12, (InputError,)

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._valid = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(JOBS.glob("*.yaml"))]
        self._texts = [path.read_text(encoding="utf-8") for path in sorted(JOBS.glob("*.yaml"))]
        self._places = all_places(RunConfig)
        self._keys = tuple({place.rpartition(".")[2] for place in self._places})

    def make(self, random: Random) -> tuple[bytes, list[str]]:
        kind = random.random()
        if kind < 0.25:
            text = change_text(random, random.choice(self._texts), self._texts)
        elif kind < 0.35:
            text = hostile_yaml(random).encode("utf-8", "surrogatepass")
        else:
            values = change_values(random, random.choice(self._valid), self._keys)
            text = yaml.safe_dump(values, allow_unicode=random.random() < 0.5).encode("utf-8", "replace")
        overrides = [self._override(random) for _ in range(random.choice((0, 0, 0, 1, 2)))]
        return text, overrides

    def _override(self, random: Random) -> str:
        value = random.choice(
            ("1", "[1", "{a: 1}", "null", "&a [*a]", "!!int ''", "'", "0x" + "f" * 40, "[[" * 30, "a")
        )
        text = f"{random.choice(self._places)}={value}"
        if random.random() < 0.3:
            text = text.replace(".", random.choice((".0.", "..", ".-1.", ".x.")), 1)
        return change_text(random, text).decode("utf-8", "replace") if random.random() < 0.3 else text

    def read(self, given: tuple[bytes, list[str]]) -> None:
        path = self.folder / "run.yaml"
        path.write_bytes(given[0])
        config = load_config(path, given[1])
        with_absolute_paths(config).to_yaml().encode()


def hostile_yaml(random: Random) -> str:
    """Return one of YAML's traps, at a random setting."""
    place = random.choice(("name", "seed", "teachers", "training", "x", "<<"))
    depth, width = random.randint(2, 9), random.randint(2, 9)
    bomb = "a0: &a0 [x]\n" + "".join(
        f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]\n" for level in range(1, depth)
    )
    merged = "b0: &b0 {k0: 1}\n" + "".join(
        f"b{level}: &b{level} {{<<: [{', '.join([f'*b{level - 1}'] * width)}], k{level}: 1}}\n"
        for level in range(1, depth)
    )
    traps = (
        f"{bomb}{place}: *a{depth - 1}\n", f"{merged}{place}: *b{depth - 1}\n", f"{place}: &a [*a]\n",
        f"{place}: &a {{b: *a}}\n", f"{place}: " + "[" * random.choice((40, 60, 3000)), f"{place}: !!timestamp x\n",
        f"{place}: !!int ''\n", f"{place}: !!bool x\n", f"{place}: !!float ''\n", f"{place}: !!set {{a, b}}\n",
        f"{place}: !!binary 'a'\n", f"{place}: !!binary /w==\n", f"{place}: !!omap [a: 1]\n", f"{place}: 2024-13-01\n",
        f"{place}: !!python/object/apply:os.system [x]\n", f"{place}: 0x{'f' * 5000}\n", f"{place}: {'1:' * 300}1\n",
        f'{place}: "\\ud800"\n', f"{place}: {'9' * 5000}\n", f"? [a, b]\n: {place}\n", f"{place}: !<tag> x\n",
        f"{'k' * 100_000}: 1\n", f"{place}: 1\n{place}: 2\n", f"%YAML 9.9\n---\n{place}: 1\n", f"--- {place}\n--- 2\n",
    )  # fmt: skip
    return random.choice(traps)


class Rows(Target):
    """Files of rows in every format, compressed or not, and the texts of their rows."""

    name, share, refusals = "rows", 17, (InputError,)
    _FIELDS = (
        "prompt", "completion", "messages", "conversations", "text", "chosen", "rejected", "tools", "role", "content",
        "from", "value", "weight", "tool_calls", "function_call", "arguments", "system",
    )  # fmt: skip

    def __init__(self, folder: Path):
        super().__init__(folder)
        call = {"type": "function", "function": {"name": "f", "arguments": {"city": "Bern"}}}
        chat = [{"role": "user", "content": "how many?"}, {"role": "assistant", "content": "24", "weight": 1}]
        self._valid: list[dict[str, Any]] = [
            {"prompt": "2 + 2?", "completion": "4"}, {"text": "once upon a time"}, {"messages": chat},
            {"prompt": chat[:1], "completion": chat[1:]}, {"prompt": "a", "chosen": "b", "rejected": "c"},
            {"messages": [chat[0], {"role": "assistant", "content": None, "tool_calls": [call]}], "tools": [call]},
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "be brief"},
        ]  # fmt: skip
        self._tables = [_parquet(row) for row in self._valid]

    def make(self, random: Random) -> tuple[str, bytes]:
        suffix = random.choice((".jsonl", ".jsonl", ".json", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz"))
        if suffix == ".parquet":
            return suffix, change_bytes(random, random.choice(self._tables), self._tables)
        rows = [random.choice(self._valid)] * random.randint(1, 3)
        changed: Any = change_values(random, rows, self._FIELDS) if random.random() < 0.7 else rows
        if suffix in (".csv", ".tsv"):
            mark = "," if suffix == ".csv" else "\t"
            text = "\n".join(mark.join(json.dumps(value) for value in values) for values in _table(rows))
        elif suffix == ".json":
            text = json.dumps(changed if random.random() < 0.5 else {"train": changed, "x": [1]}, indent=1)
        else:
            lines = changed if isinstance(changed, list) else [changed]
            text = "\n".join(json.dumps(row) for row in lines)
        data = change_text(random, text) if random.random() < 0.5 else text.encode("utf-8", "surrogatepass")
        if suffix.endswith(".gz"):
            data = gzip.compress(data, 1)
            data = change_bytes(random, data) if random.random() < 0.5 else data
        return suffix, data

    def read(self, given: tuple[str, bytes]) -> None:
        path = self.folder / f"rows{given[0]}"
        path.write_bytes(given[1])
        source = DataSource(path=str(path))
        rows = list(read_rows(source))
        texts = RowTexts(source)
        kind = texts.format_of(rows[0])
        for row in rows:
            if kind == "messages":
                texts.conversation(row)
                texts.tools(row)
            elif kind == "text":
                texts.text(row)
            else:
                texts.prompt(row)
                texts.completion(row)


def _parquet(row: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([row] * 3), buffer, compression="zstd")
    return buffer.getvalue()


def _table(rows: list[dict[str, Any]]) -> Iterator[list[Any]]:
    yield list(rows[0])
    yield from (list(row.values()) for row in rows)


class RunDirectories(Target):
    """Run directories, which may come from someone else: `rayk status`."""

    name, share, refusals = "runs", 3, (InputError,)

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._run = make_run(folder / "run", kd=True, steps=3)
        self._files = {path.name: path.read_text(encoding="utf-8") for path in self._run.iterdir()}

    def make(self, random: Random) -> dict[str, bytes | None]:
        files: dict[str, bytes | None] = {name: text.encode() for name, text in self._files.items()}
        name = random.choice(list(files))
        if random.random() < 0.4:
            files[name] = change_text(random, self._files[name])
        elif name == "config.yaml":
            values = change_values(random, yaml.safe_load(self._files[name]), ("name", "method", "training"))
            files[name] = yaml.safe_dump(values).encode("utf-8", "replace")
        else:
            rows = [json.loads(line) for line in self._files[name].splitlines()]
            text = "\n".join(json.dumps(change_values(random, row, ("step", "evaluation_loss"))) for row in rows)
            files[name] = text.encode("utf-8", "surrogatepass") + b"\n"
        if random.random() < 0.5:
            files["summary.json"] = None
        return files

    def read(self, given: dict[str, bytes | None]) -> None:
        for name, data in given.items():
            if data is None:
                (self._run / name).unlink(missing_ok=True)
            else:
                (self._run / name).write_bytes(data)
        for section in status(self._run):
            assert all(isinstance(text, str) for text in section.values())


def use_signals(signals: SignalBatch) -> None:
    """Use signals as a client and a loss do."""
    assert int(signals.offsets[-1]) == signals.tokens and bool((signals.offsets.diff() >= 0).all())
    unusable = signals.invalid_rows()
    kept = signals.select([row for row in range(len(signals)) if row not in unusable])
    again = decode(encode(kept))
    assert again.support == signals.support and torch.equal(again.offsets, kept.offsets)
    if kept.logprobs is not None and 1.0 in getattr(kept.support, "temperatures", ()):
        kept.at_temperature()


TARGETS: tuple[type[Target], ...] = (Wire, Entries, Segments, Tensors, Values, Configs, Rows, RunDirectories)


@contextmanager
def opened(kind: type[Target], folder: Path) -> Iterator[Target]:
    """Make a target whose folder is the current one in the block: hostile relative paths lead to an empty folder."""
    folder.mkdir(parents=True)
    before = Path.cwd()
    target = kind(folder)
    os.chdir(folder)
    try:
        yield target
    finally:
        os.chdir(before)
