"""Read rows from JSONL, JSON and Parquet files, globs and folders of them, and saved or hub datasets."""

import glob
import json
import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from rayk.config import DataSource
from rayk.config.paths import DATA_SUFFIXES, is_local_path
from rayk.data.rows import Row
from rayk.errors import InputError

__all__ = ["Row", "read_rows"]

_SPLIT_WORDS = {"train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation"}
_SAVED_BY_DATASETS = ("dataset_dict.json", "state.json")
_PARQUET_ROWS = 1000


def read_rows(source: DataSource) -> Iterator[Row]:
    """Yield the rows of a source in the order of its files, at most `source.rows` of them.

    Raises:
        InputError: the source is missing or empty, or a row cannot be read; the message names the file and line. The
            path is checked when the function is called, and rows are read during iteration.
    """
    found = _open(source)
    return _require_rows(islice(found, source.rows), source)


def _open(source: DataSource) -> Iterator[Row]:
    path = Path(source.path).expanduser()
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        if any((path / name).is_file() for name in _SAVED_BY_DATASETS):
            return _read_saved(path, source.split)
        return _read_files(_files_of_folder(path, source))
    if glob.has_magic(source.path):
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if os.path.isfile(match))
        if not matches:
            raise InputError(f"No file matches '{source.path}'; check the pattern in the data section.")
        return _read_files(matches)
    if is_local_path(source.path):
        raise InputError(f"The data file or folder '{source.path}' does not exist; check the path.")
    return _read_hub(source)


def _require_rows(rows: Iterator[Row], source: DataSource) -> Iterator[Row]:
    first = next(rows, None)
    if first is None:
        raise InputError(f"'{source.path}' has no rows; give a source that has at least one.")
    yield first
    yield from rows


def _read_files(paths: list[Path]) -> Iterator[Row]:
    for path in paths:
        yield from _read_file(path)


def _read_file(path: Path) -> Iterator[Row]:
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise InputError(f"'{path}' is not a file type that rayk reads; give one of {', '.join(DATA_SUFFIXES)}.")
    return _report_read_errors(readers[path.suffix](path), path)


def _report_read_errors(rows: Iterator[Row], path: Path) -> Iterator[Row]:
    """Yield `rows`; turn an OSError while reading them into an InputError that names `path`."""
    try:
        yield from rows
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {error.strerror or error}.") from error


def _read_jsonl(path: Path) -> Iterator[Row]:
    # Read as bytes: text mode also splits lines at a single carriage return.
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield _row(_parse(line.rstrip(), where), where)


def _read_json(path: Path) -> Iterator[Row]:
    """Read a .json file: a list of objects, or JSONL with another suffix."""
    with open(path, "rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        yield from _read_jsonl(path)
        return
    for number, fields in enumerate(_parse(path.read_bytes().removeprefix(b"\xef\xbb\xbf"), str(path)), start=1):
        where = f"row {number} of {path}"
        yield _row(fields, where)


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text; save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{where} is not JSON: {error.msg} ({place}).") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}.") from error


def _row(fields: Any, where: str) -> Row:
    if not isinstance(fields, dict):
        raise InputError(f'{where} is a {type(fields).__name__}, not an object with fields such as {{"prompt": …}}.')
    return Row(fields, where)


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(fields, f"row {number} of {path}")
    except pa.ArrowException as error:
        raise InputError(f"'{path}' is not a valid Parquet file: {_first_line(error)}") from error


def _files_of_folder(folder: Path, source: DataSource) -> list[Path]:
    """Return the files of the split: those with its name in their path, or all if no path names a split."""
    inside = folder / source.name if source.name and (folder / source.name).is_dir() else folder
    files = sorted(path for path in inside.rglob("*") if path.suffix in DATA_SUFFIXES and path.is_file())
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(inside).parts)]
    if not files:
        raise InputError(f"The folder '{folder}' contains no {', '.join(DATA_SUFFIXES)} file; check the path.")
    words = {path: set(re.split(r"[^a-z0-9]+", str(path.relative_to(inside)).lower())) for path in files}
    named = [path for path in files if source.split.lower() in words[path]]
    if not named and any(words[path] & _SPLIT_WORDS for path in files):
        raise InputError(
            f"The folder '{folder}' has no file for the split '{source.split}' (it has: "
            f"{', '.join(path.name for path in files[:5])}); set the source's split, or give a file."
        )
    return named or files


def _read_saved(folder: Path, split: str) -> Iterator[Row]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"'{folder}' cannot be loaded as a saved dataset: {_first_line(error)}") from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise InputError(f"'{folder}' has no split '{split}' (it has: {', '.join(saved)}); set the source's split.")
        saved = saved[split]
    return _read_dataset(saved, str(folder))


def _read_hub(source: DataSource) -> Iterator[Row]:
    import datasets

    try:
        loaded = datasets.load_dataset(source.path, source.name, split=source.split)
    except Exception as error:  # the hub, the network and dataset builders raise errors of many types
        raise InputError(
            f"No dataset '{source.path}' (split '{source.split}') could be loaded from a file or the hub: "
            f"{_first_line(error)}"
        ) from error
    return _read_dataset(loaded, source.path)


def _read_dataset(dataset: Any, name: str) -> Iterator[Row]:
    for number, fields in enumerate(dataset, start=1):
        yield Row(fields, f"row {number} of {name}")


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    line = text.splitlines()[0] if text else type(error).__name__
    return line if line.endswith(".") else line + "."
