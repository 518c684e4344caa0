"""What teachers have written, on disk: kept as it comes, so that nothing is asked, or paid for, twice.

The folder `<output>/synthesis/` holds

- `settings.yaml`: what it is made with; under other settings it is refused;
- `completions/part-*.parquet`: every completion with its provenance, by request key;
- `usage.json`: what a paid endpoint has charged for them;
- `rows.parquet`, `rejected.parquet`, `summary.json`: what became of them, written last.

A file is written under another name, synced and renamed, so what has its name is whole. What is damaged all the same is
set aside and asked for again. One process at a time has the folder (`lock`).
"""

import contextlib
import errno
import fcntl
import io
import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from rayk.config import difference
from rayk.errors import InputError, RunFailed

logger = logging.getLogger(__name__)

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
_MANY_PARTS = 64


@dataclass(frozen=True)
class Written:
    """What a teacher wrote.

    Attributes:
        key: of the request, by which the store has it.
        text: as it came.
        tokens: how many; None where an endpoint does not tell.
        mean_logprob: of them, nats a token, under the teacher at temperature 1; None where it is not known.
        finish_reason: 'stop', 'length', or 'error' where there was no answer; `reason` says why.
    """

    key: str
    text: str
    tokens: int | None
    mean_logprob: float | None
    finish_reason: str
    reason: str = ""


class Store:
    """The folder, held by this process while it is open (a context manager).

    Raises:
        InputError: it cannot be written, or another process has it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._completions = folder / "completions"
        self._parts: list[pa.Table] = []
        self._places: dict[str, tuple[int, int]] = {}
        self._pending: dict[str, dict[str, Any]] = {}
        self._earlier: dict[str, dict[str, Any]] = {}
        self._flushing = threading.Lock()

    def __enter__(self) -> "Store":
        with _told(self.folder):
            self._completions.mkdir(parents=True, exist_ok=True)
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
            before = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            if place := difference(before, dict(settings), ignored | chosen_by):
                raise InputError(
                    f"What is in '{self.folder}' was made with another '{place}'; go on with the same settings, or "
                    "give another --output."
                )
            if difference(before, dict(settings), ignored):
                self._forget_rows()
        self._write("settings.yaml", yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True).encode())
        self._load()

    def look_into(self, folder: Path) -> None:
        """Let `find` find what another folder, of an earlier round, holds too. It then becomes this one's."""
        for path in sorted((folder / "completions").glob("part-*.parquet")):
            with contextlib.suppress(pa.ArrowException, OSError, KeyError):  # what is damaged is asked for again
                table = pq.read_table(path, page_checksum_verification=True).select(_SCHEMA.names)
                self._earlier |= {row["key"]: row for row in table.to_pylist()}

    def __len__(self) -> int:
        return len(self._places) + len(self._pending)

    def find(self, key: str) -> Written | None:
        """What was written for a request."""
        if key not in self._places and key not in self._pending and key in self._earlier:
            self._pending[key] = self._earlier.pop(key)
        if row := self._pending.get(key):
            return Written(key, row["text"], row["tokens"], row["mean_logprob"], row["finish_reason"])
        if key not in self._places:
            return None
        part, place = self._places[key]
        return Written(*(self._parts[part].column(name)[place].as_py() for name in _READ))

    def add(self, written: Written, provenance: Mapping[str, Any]) -> None:
        """Keep a completion: in memory until the next `flush`."""
        row = {name: getattr(written, name) for name in _READ}
        self._pending[written.key] = {**row, **provenance}

    @property
    def unwritten(self) -> int:
        """Completions that are not on disk yet."""
        return len(self._pending)

    def flush(self) -> None:
        """Write what is not on disk yet. While it runs, on any thread, more may be added.

        Raises:
            RunFailed: the disk is full or broken.
        """
        with self._flushing:
            rows = list(self._pending.values())
            if not rows:
                return
            table = pa.Table.from_pylist(rows, _SCHEMA)
            self._write_part(table)
            self._hold(table)
            for row in rows:
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
        """What the folder's rows come to; None while they are not made."""
        path = self.folder / "summary.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    @property
    def rows(self) -> Path:
        """What is trained on."""
        return self.folder / "rows.parquet"

    def keep(self, rows: Sequence[Mapping[str, Any]], rejected: Sequence[Mapping[str, Any]]) -> None:
        """Write what became of the completions. Until `finish` they count as not finished."""
        self._forget_rows()
        for name, table in (("rows", rows), ("rejected", rejected)):
            self._write(f"{name}.parquet", _parquet(table_of(table)))

    def put(self, name: str, table: pa.Table) -> None:
        """Write a table of a recipe's own, `name`.parquet."""
        self._write(f"{name}.parquet", _parquet(table))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary of what was kept."""
        self._write("summary.json", json.dumps(summary, indent=2, ensure_ascii=False).encode())

    def _forget_rows(self) -> None:
        with _told(self.folder):
            (self.folder / "summary.json").unlink(missing_ok=True)

    def _load(self) -> None:
        paths = sorted(self._completions.glob("part-*.parquet"))
        for left_over in [*self.folder.glob("*.unfinished"), *self._completions.glob("*.unfinished")]:
            left_over.unlink()
        for path in paths:
            table = self._read(path)
            if table is not None:
                self._hold(table)
        if len(paths) > _MANY_PARTS:
            self._merge(paths)

    def _read(self, path: Path) -> pa.Table | None:
        try:
            return pq.read_table(path, page_checksum_verification=True).select(_SCHEMA.names)
        except (pa.ArrowException, OSError, KeyError) as error:
            path.rename(path.with_suffix(".damaged"))
            logger.warning(
                "'%s' is damaged (%s) and set aside; what it held is asked for again.",
                path, str(error).splitlines()[0],
            )  # fmt: skip
            return None

    def _merge(self, paths: list[Path]) -> None:
        """Many small parts into one. A kill in between leaves completions twice, which does no harm."""
        self._write_part(pa.concat_tables(self._parts))
        for path in paths:
            path.unlink(missing_ok=True)

    def _write_part(self, table: pa.Table) -> None:
        numbers = (int(path.stem.split("-")[1]) for path in self._completions.glob("part-*.parquet"))
        self._write(f"completions/part-{max(numbers, default=0) + 1:06d}.parquet", _parquet(table))

    def _hold(self, table: pa.Table) -> None:
        self._parts.append(table.combine_chunks())
        number = len(self._parts) - 1
        self._places |= {key: (number, place) for place, key in enumerate(table.column("key").to_pylist())}

    def _write(self, name: str, content: bytes) -> None:
        path = self.folder / name
        part = path.with_name(path.name + ".unfinished")
        with _told(self.folder):
            try:
                with part.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(path)
            except OSError:
                part.unlink(missing_ok=True)
                raise
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Say what the disk does not take."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise RunFailed(
                f"No room is left in '{folder}' ({error.strerror}); what was written before is kept. Make room and run "
                "again: it goes on from there."
            ) from error
        raise InputError(f"'{folder}' cannot be written: {error.strerror}.") from error


def table_of(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows as columns; one whose values are of several types holds them as JSON."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: _column([row.get(name) for row in rows]) for name in names})


def _column(values: list[Any]) -> pa.Array:
    try:
        column = pa.array(values)
        if pa.types.is_nested(column.type):
            _parquet(pa.table({"": column[:1]}))  # what Parquet has no type for, such as an empty object, is told here
        return column
    except (pa.ArrowException, OverflowError, UnicodeError):
        return pa.array([json.dumps(value, default=str) for value in values])


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()
