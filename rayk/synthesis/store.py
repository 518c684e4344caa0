"""What teachers have written, on disk: kept as it comes, so that nothing is asked, or paid for, twice.

The folder `<output>/synthesis/` holds

- `settings.yaml`: what it is made with; under other settings it is refused;
- `completions/part-*.parquet`: every completion with its provenance, by request key;
- `refused/part-*.parquet`: in the same form what an endpoint will not answer; deleted, it is asked again;
- `usage.json`: what a paid endpoint has charged for them;
- `rows.parquet`, `rejected.parquet`, `summary.json`: what became of them, written last.

What has its name is whole; what is damaged all the same is set aside and asked for again (`rayk.storage`). One process
at a time has the folder (`lock`).
"""

import contextlib
import errno
import fcntl
import json
import threading
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from rayk.config import difference
from rayk.errors import InputError
from rayk.storage.atomic import disk_errors, remove_unfinished, write_whole
from rayk.storage.parquet_store import ParquetStore, parquet_bytes, read_parquet

_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("prompt", pa.string()),
        ("parameters", pa.string()),
        ("seed", pa.uint64()),
        ("teacher", pa.string()),
        ("model", pa.string()),
        ("weights", pa.string()),
        ("text", pa.string()),
        ("tokens", pa.int32()),
        ("mean_logprob", pa.float32()),
        ("finish_reason", pa.string()),
        ("written_at_seconds", pa.float64()),
    ]
)
_READ = ("key", "text", "tokens", "mean_logprob", "finish_reason")
_COMPLETIONS, _REFUSALS = "completions", "refused"
_REFUSED = "refused"
"""The `finish_reason` of a refusal on disk; its `text` is the reason."""


@dataclass(frozen=True)
class StoredCompletion:
    """What a teacher wrote.

    Attributes:
        key: of the request, by which the store has it.
        text: as it came.
        tokens: how many; None where an endpoint does not tell.
        mean_logprob: of them, nats a token, under the teacher at temperature 1; None where it is not known.
        finish_reason: 'stop', 'length', or 'error' where there was no answer; `reason` says why.
        refused: there will be none for this prompt, however often it is asked.
    """

    key: str
    text: str
    tokens: int | None
    mean_logprob: float | None
    finish_reason: str
    reason: str = ""
    refused: bool = False


class CompletionStore:
    """The folder, held by this process while it is open (a context manager).

    Raises:
        InputError: it cannot be written, or another process has it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._completions = ParquetStore(folder / _COMPLETIONS, _SCHEMA)
        self._refused = ParquetStore(folder / _REFUSALS, _SCHEMA)
        self._pending: dict[str, dict[str, Any]] = {}
        self._earlier: dict[str, dict[str, Any]] = {}
        self._flushing = threading.Lock()

    def __enter__(self) -> "CompletionStore":
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / "lock", "w")  # held until __exit__
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise InputError(
                    f"Another process is writing into '{self.folder}'; wait for its end, or give another --output."
                ) from error
            raise InputError(f"'{self.folder}' cannot be locked ({error.strerror}); give another --output.") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def claim(self, settings: Mapping[str, Any], ignored: set[str], chosen_by: set[str]) -> None:
        """Hold `settings` against those the folder was made with; read what it holds.

        Args:
            ignored: places ("a.b") that change nothing.
            chosen_by: places that change what is made of the completions, but no completion: with others the rows are
                made anew.

        Raises:
            InputError: another setting; the sentence names it.
        """
        path = self.folder / "settings.yaml"
        if path.exists():
            before = _settings_in(path)
            if place := difference(before, dict(settings), ignored | chosen_by):
                raise InputError(
                    f"What is in '{self.folder}' was made with another '{place}'; go on with the same settings, or "
                    "give another --output."
                )
            if difference(before, dict(settings), ignored):
                self._forget_rows()
        self._write("settings.yaml", yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True).encode())
        remove_unfinished(self.folder)
        self._completions.load()
        self._refused.load()

    def look_into(self, folder: Path) -> None:
        """Let `find` find what another folder, of an earlier round, holds too. It then becomes this one's."""
        paths = (path for kept in (_COMPLETIONS, _REFUSALS) for path in (folder / kept).glob("part-*.parquet"))
        for path in sorted(paths):
            with contextlib.suppress(pa.ArrowException, OSError, KeyError):  # what is damaged is asked for again
                self._earlier |= {row["key"]: row for row in read_parquet(path, _SCHEMA).to_pylist()}

    def __len__(self) -> int:
        return len(self._completions) + len(self._pending)

    def find(self, key: str) -> StoredCompletion | None:
        """What was written for a request."""
        if row := self._pending.get(key):
            return _written(row)
        found = self._completions.find(key, _READ) or self._refused.find(key, _READ)
        if found is not None:
            return _written(dict(zip(_READ, found, strict=True)))
        if row := self._earlier.pop(key, None):
            self._pending[key] = row
            return _written(row)
        return None

    def add(self, written: StoredCompletion, provenance: Mapping[str, Any]) -> None:
        """Keep a completion, or that there will be none: in memory until the next `flush`."""
        row = {name: getattr(written, name) for name in _READ}
        if written.refused:
            row |= {"text": written.reason, "finish_reason": _REFUSED}
        self._pending[written.key] = {**row, **provenance}

    @property
    def unwritten(self) -> int:
        """Completions and refusals that are not on disk yet."""
        return len(self._pending)

    @property
    def unwritten_keys(self) -> set[str]:
        return set(self._pending)

    @property
    def refusals(self) -> int:
        """Requests that will have no answer, on disk."""
        return len(self._refused)

    def flush(self, keys: Container[str] | None = None) -> None:
        """Write what is not on disk yet, or of that these keys. While it runs, on any thread, more may be added.

        Raises:
            RunFailed: the disk is full or broken.
        """
        with self._flushing:
            rows = [row for key, row in list(self._pending.items()) if keys is None or key in keys]
            # What was asked next may depend on a refusal, so those are written first.
            for parts, refused in ((self._refused, True), (self._completions, False)):
                if kept := [row for row in rows if (row["finish_reason"] == _REFUSED) is refused]:
                    parts.add(kept)
                    for row in kept:
                        del self._pending[row["key"]]

    @property
    def usage(self) -> dict[str, Any]:
        """What was charged for what the folder holds, as last told."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            return json.loads((self.folder / "usage.json").read_text(encoding="utf-8"))
        return {}

    @usage.setter
    def usage(self, usage: Mapping[str, Any]) -> None:
        self._write("usage.json", json.dumps(dict(usage)).encode())

    @property
    def summary(self) -> dict[str, Any] | None:
        """What the folder's rows come to; None while they are not made, or where it is damaged, so that they are made
        anew."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            return json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
        return None

    @property
    def rows(self) -> Path:
        """What is trained on."""
        return self.folder / "rows.parquet"

    def keep(self, rows: Sequence[Mapping[str, Any]], rejected: Sequence[Mapping[str, Any]]) -> None:
        """Write what became of the completions. Until `finish` they count as not finished."""
        self._forget_rows()
        for name, table in (("rows", rows), ("rejected", rejected)):
            self._write(f"{name}.parquet", parquet_bytes(table_of(table)))

    def put(self, name: str, table: pa.Table) -> None:
        """Write a table of a recipe's own, `name`.parquet."""
        self._write(f"{name}.parquet", parquet_bytes(table))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary of what was kept."""
        self._write("summary.json", json.dumps(summary, indent=2, ensure_ascii=False).encode())

    def _forget_rows(self) -> None:
        with disk_errors(self.folder):
            (self.folder / "summary.json").unlink(missing_ok=True)

    def _write(self, name: str, content: bytes) -> None:
        write_whole(self.folder / name, content)


def _settings_in(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        found = None
    if not isinstance(found, dict):
        raise InputError(
            f"'{path}' cannot be read, so nobody knows what the completions beside it were made with; if the settings "
            "are the same, remove it and run again, or give another --output."
        )
    return found


def _written(row: Mapping[str, Any]) -> StoredCompletion:
    if row["finish_reason"] == _REFUSED:
        return StoredCompletion(row["key"], "", None, None, "error", row["text"], refused=True)
    return StoredCompletion(*(row[name] for name in _READ))


def table_of(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows as columns; one whose values are of several types holds them as JSON."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: _column([row.get(name) for row in rows]) for name in names})


def _column(values: list[Any]) -> pa.Array:
    try:
        column = pa.array(values)
        if pa.types.is_nested(column.type):
            # What Parquet has no type for, such as an empty object, is told here.
            parquet_bytes(pa.table({"": column[:1]}))
        return column
    except (pa.ArrowException, OverflowError, UnicodeError):
        return pa.array([json.dumps(value, default=str) for value in values])
