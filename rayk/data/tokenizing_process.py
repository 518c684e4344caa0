"""Tokenize a large source in several processes.

Each process reads all rows, which is cheap, and tokenizes every n-th chunk of them. The processes are started as
programs of their own: a fork of the driver would copy the threads of its libraries, and a spawned process would run the
user's script again.
"""

import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from rayk.data.examples import ExampleTable
from rayk.data.sources import read_rows
from rayk.data.tokenizing import CHUNK_ROWS, RowTokenizer
from rayk.errors import InputError, RunFailed

_LARGE_BYTES = 32 << 20
"""Size of a source from which on processes save more time than they take to start."""
_MOST_PROCESSES = 16


@dataclass
class RowCounts:
    """Counts of the rows that were left out or divided, as `RowTokenizer` has them."""

    skipped: dict[str, int] = field(default_factory=dict)
    first_skipped: dict[str, str] = field(default_factory=dict)
    divided_rows: int = 0
    ends: list[int] = field(default_factory=list)


def choose_processes(files: Sequence[Path]) -> int:
    """Return the number of processes for a source of these files; 1 for a small one."""
    if sum(file.stat().st_size for file in files) < _LARGE_BYTES:
        return 1
    return max(1, min(_MOST_PROCESSES, len(os.sched_getaffinity(0))))


def tokenize_in_processes(arguments: dict[str, Any], processes: int) -> tuple[pa.Table, RowCounts]:
    """Tokenize a source; return the examples in the order of the rows, without metadata, and the counts.

    Args:
        arguments: those of `RowTokenizer`, by name.

    Raises:
        InputError: as `RowTokenizer.examples`; of several wrong rows, the first one is named.
        RunFailed: a process was killed.
    """
    job = pickle.dumps(arguments)
    with tempfile.TemporaryDirectory(prefix="rayk-tokens-") as folder:
        started = []
        for part in range(processes):
            command = [sys.executable, "-m", "rayk.data.tokenizing_process", folder, str(part), str(processes)]
            started.append(subprocess.Popen(command, stdin=subprocess.PIPE, env=os.environ | _import_path()))
        try:
            for process in started:
                assert process.stdin is not None
                with process.stdin as pipe:
                    pipe.write(job)
            codes = [process.wait() for process in started]
        finally:
            for process in started:
                process.kill()
                process.wait()
        if any(codes):
            raise RunFailed(f"A process that tokenizes rows ended with status {next(filter(None, codes))}.")
        return _merge([Path(folder) / str(part) for part in range(processes)])


def _import_path() -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _merge(parts: Sequence[Path]) -> tuple[pa.Table, RowCounts]:
    records = [json.loads(part.with_suffix(".json").read_text()) for part in parts]
    if errors := [record["error"] for record in records if record["error"]]:
        raise InputError(min(errors)[1])
    batches = [pa.ipc.open_stream(part.with_suffix(".arrow").read_bytes()).read_all().to_batches() for part in parts]
    ordered = [batches[i % len(parts)][i // len(parts)] for i in range(sum(map(len, batches)))]
    counts = RowCounts()
    skipped: Counter[str] = Counter()
    first: dict[str, list[Any]] = {}
    for record in records:
        skipped.update(record["counts"]["skipped"])
        counts.divided_rows += record["counts"]["divided_rows"]
        counts.ends = sorted({*counts.ends, *record["counts"]["ends"]})
        for reason, place in record["first"].items():
            first[reason] = min(first.get(reason, place), place)  # [number of the chunk, place]
    counts.skipped, counts.first_skipped = dict(skipped), {reason: where for reason, (_, where) in first.items()}
    return pa.Table.from_batches(ordered), counts


def _work(folder: Path, part: int, parts: int) -> None:
    """Tokenize every `parts`-th chunk from `part` on; the arguments of `RowTokenizer` come from standard input."""
    arguments = pickle.load(sys.stdin.buffer)
    tokenizer, remaining, number = RowTokenizer(**arguments), iter(read_rows(arguments["source"])), 0
    error: tuple[int, str] | None = None
    first: dict[str, tuple[int, str]] = {}
    with pa.OSFile(str(folder / f"{part}.arrow"), "wb") as file:
        writer = None
        try:
            while chunk := list(islice(remaining, CHUNK_ROWS)):
                if number == 0:
                    tokenizer.detect_format(chunk[0])
                if number % parts == part:
                    table = ExampleTable.from_examples(tokenizer.examples(chunk)).table.replace_schema_metadata()
                    writer = writer or pa.ipc.new_stream(file, table.schema)
                    # One batch for each chunk, also an empty one, so that the order can be restored.
                    writer.write_batch(table.to_batches()[0] if len(table) else _empty(table.schema))
                    first = {r: (number, where) for r, where in tokenizer.first_skipped.items()} | first
                number += 1
        except InputError as problem:
            error = (number, str(problem))
        finally:
            (writer or pa.ipc.new_stream(file, pa.schema([]))).close()
    counts = RowCounts(dict(tokenizer.skipped), tokenizer.first_skipped, tokenizer.divided_rows, sorted(tokenizer.ends))
    record = {"error": error, "counts": asdict(counts), "first": first}
    (folder / f"{part}.json").write_text(json.dumps(record))


def _empty(schema: pa.Schema) -> pa.RecordBatch:
    return pa.record_batch([pa.array([], kind) for kind in schema.types], schema=schema)


if __name__ == "__main__":
    _work(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
