"""Store completions on disk as they arrive, so that none is requested, or paid for, twice.

The folder `<output>/synthesis/` contains

- `settings.yaml`: the settings with which the completions were generated; the folder rejects other settings;
- `completions/part-*.parquet`: every completion with its provenance, by request key;
- `refused/part-*.parquet`: requests that an endpoint refused, in the same form; delete them to request them again;
- `usage.json`: what a paid endpoint has charged for them;
- `rows.parquet`, `rejected.parquet`, `summary.json`: the rows made from the completions, written last.

Files are replaced atomically. A damaged file is renamed and its completions are requested again (`rayk.storage`). Only
one process at a time can open the folder (`lock`).
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
from rayk.text.words import whole_characters

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
_COLUMNS = ("key", "text", "tokens", "mean_logprob", "finish_reason")
_COMPLETIONS, _REFUSALS = "completions", "refused"
_REFUSED = "refused"
"""The `finish_reason` of a refused request on disk; its `text` is the reason."""


@dataclass(frozen=True)
class StoredCompletion:
    """A completion in the store, or the reason why there is none.

    Attributes:
        key: key of the request.
        text: generated text, unchanged.
        tokens: number of generated tokens; None if an endpoint does not return it.
        mean_logprob: mean log-prob per token, in nats, under the generating model at temperature 1; None if unknown.
        finish_reason: 'stop', 'length', or 'error' if there is no completion; `reason` then says why.
        refused: the request was refused for good, so that repeating it is pointless.
        thought: the thought of a reasoning model, which the client splits from the text (`rayk.text.thoughts`); the
            store itself contains both in `text`.
        is_cut_in_thought: the completion ends inside its thought, so that there is no answer.
    """

    key: str
    text: str
    tokens: int | None
    mean_logprob: float | None
    finish_reason: str
    reason: str = ""
    refused: bool = False
    thought: str = ""
    is_cut_in_thought: bool = False


class CompletionStore:
    """The folder of completions, locked for this process while the context manager is open.

    Raises:
        InputError: the folder cannot be written, or another process has locked it.
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
                    f"Another process is writing into '{self.folder}'; wait until it ends, or give another --output."
                ) from error
            raise InputError(f"'{self.folder}' cannot be locked ({error.strerror}); give another --output.") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def claim(self, settings: Mapping[str, Any], ignored: set[str], row_settings: set[str]) -> None:
        """Compare `settings` with those the folder was created with, and load the completions.

        Args:
            ignored: settings ("a.b") that may differ.
            row_settings: settings that change the rows made from completions, but no completion; if one of them
                differs, the rows are made again.

        Raises:
            InputError: another setting differs; the message names it.
        """
        path = self.folder / "settings.yaml"
        if path.exists():
            before = _read_settings(path)
            if place := difference(before, dict(settings), ignored | row_settings):
                raise InputError(
                    f"The completions in '{self.folder}' were generated with another '{place}'; continue with the same "
                    "settings, or give another --output."
                )
            if difference(before, dict(settings), ignored):
                self._remove_summary()
        self._write("settings.yaml", yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True).encode())
        remove_unfinished(self.folder)
        self._completions.load()
        self._refused.load()

    def add_earlier_round(self, folder: Path) -> None:
        """Let `find` also return the completions of an earlier round's folder; those found are copied into this one."""
        paths = (path for name in (_COMPLETIONS, _REFUSALS) for path in (folder / name).glob("part-*.parquet"))
        for path in sorted(paths):
            with contextlib.suppress(pa.ArrowException, OSError, KeyError):  # damaged ones are requested again
                self._earlier |= {row["key"]: row for row in read_parquet(path, _SCHEMA).to_pylist()}

    def __len__(self) -> int:
        return len(self._completions) + len(self._pending)

    def find(self, key: str) -> StoredCompletion | None:
        """Return the completion of a request; None if it is not stored."""
        if row := self._pending.get(key):
            return _from_row(row)
        found = self._completions.find(key, _COLUMNS) or self._refused.find(key, _COLUMNS)
        if found is not None:
            return _from_row(dict(zip(_COLUMNS, found, strict=True)))
        if row := self._earlier.pop(key, None):
            self._pending[key] = row
            return _from_row(row)
        return None

    def add(self, completion: StoredCompletion, provenance: Mapping[str, Any]) -> None:
        """Add a completion or a refusal; it stays in memory until the next `flush`."""
        row = {name: getattr(completion, name) for name in _COLUMNS}
        if completion.refused:
            row |= {"text": completion.reason, "finish_reason": _REFUSED}
        self._pending[completion.key] = {**row, **provenance}

    @property
    def num_pending(self) -> int:
        """Number of completions and refusals that are not on disk yet."""
        return len(self._pending)

    @property
    def pending_keys(self) -> set[str]:
        """Keys of the completions and refusals that are not on disk yet."""
        return set(self._pending)

    @property
    def num_refusals(self) -> int:
        """Number of refused requests on disk."""
        return len(self._refused)

    def flush(self, keys: Container[str] | None = None) -> None:
        """Write pending completions and refusals to disk: all, or those with `keys`. Other threads may add more
        meanwhile.

        Raises:
            RunFailed: the disk is full or broken.
        """
        with self._flushing:
            rows = [row for key, row in list(self._pending.items()) if keys is None or key in keys]
            # Later requests may depend on a refusal, so refusals are written first.
            for parts, refused in ((self._refused, True), (self._completions, False)):
                if selected := [row for row in rows if (row["finish_reason"] == _REFUSED) is refused]:
                    parts.add(selected)
                    for row in selected:
                        del self._pending[row["key"]]

    @property
    def usage(self) -> dict[str, Any]:
        """Charges for all stored completions, as last written; empty if there are none."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            return json.loads((self.folder / "usage.json").read_text(encoding="utf-8"))
        return {}

    @usage.setter
    def usage(self, usage: Mapping[str, Any]) -> None:
        self._write("usage.json", json.dumps(dict(usage)).encode())

    @property
    def summary(self) -> dict[str, Any] | None:
        """Summary of the rows; None if they are not made yet, or if the file is damaged and they must be made again."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            return json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
        return None

    @property
    def rows_path(self) -> Path:
        """File with the training rows."""
        return self.folder / "rows.parquet"

    def write_rows(self, rows: Sequence[Mapping[str, Any]], rejected: Sequence[Mapping[str, Any]]) -> None:
        """Write the training rows and the rejected rows. They count as unfinished until `write_summary`."""
        self._remove_summary()
        for name, table in (("rows", rows), ("rejected", rejected)):
            self._write(f"{name}.parquet", parquet_bytes(rows_to_table(table)))

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write an additional table of a recipe to `name`.parquet."""
        self._write(f"{name}.parquet", parquet_bytes(table))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`, which marks the rows as finished."""
        self._write("summary.json", json.dumps(summary, indent=2, ensure_ascii=False).encode())

    def _remove_summary(self) -> None:
        with disk_errors(self.folder):
            (self.folder / "summary.json").unlink(missing_ok=True)

    def _write(self, name: str, content: bytes) -> None:
        write_whole(self.folder / name, content)


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        found = None
    if not isinstance(found, dict):
        raise InputError(
            f"'{path}' cannot be read, so the settings of the completions beside it are unknown; if they are the same, "
            "remove the file and run again, else give another --output."
        )
    return found


def _from_row(row: Mapping[str, Any]) -> StoredCompletion:
    if row["finish_reason"] == _REFUSED:
        return StoredCompletion(row["key"], "", None, None, "error", row["text"], refused=True)
    return StoredCompletion(*(row[name] for name in _COLUMNS))


def rows_to_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Convert rows to a table. A column with values of several types becomes text: texts unchanged, others as JSON."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: _column([row.get(name) for row in rows]) for name in names})


def _column(values: list[Any]) -> pa.Array:
    try:
        return _check_nested(pa.array(values))
    except (pa.ArrowException, OverflowError, UnicodeError):
        return pa.array(
            [value if _is_plain(value) else json.dumps(value, default=str) for value in values], pa.string()
        )


def _check_nested(column: pa.Array) -> pa.Array:
    if pa.types.is_nested(column.type):
        parquet_bytes(pa.table({"": column[:1]}))  # raises for types that Parquet lacks, such as an empty object
    return column


def _is_plain(value: Any) -> bool:
    """Return whether a column of text can contain the value: None, or text without half surrogate pairs."""
    return value is None or (isinstance(value, str) and whole_characters(value) == value)
