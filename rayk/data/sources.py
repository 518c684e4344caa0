"""Read rows from JSON, CSV and Parquet files, globs and folders of them, and saved or hub datasets."""

import glob
import io
import os
import re
import string
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from rayk.config import DataSource
from rayk.config.base import shorten
from rayk.config.paths import COMPRESSED_SUFFIXES, DATA_SUFFIXES, TEXT_SUFFIXES, expand_user, is_local_path, is_uri
from rayk.data.json_rows import read_json
from rayk.data.messages import SHAREGPT_FIELD
from rayk.data.rows import Row
from rayk.data.table_rows import read_csv
from rayk.errors import InputError

__all__ = ["Row", "read_rows"]

_SPLIT_WORDS = {"train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation"}
_SAVED_BY_DATASETS = ("dataset_dict.json", "state.json")
_BATCH_ROWS = 1000
_TABLES = tuple(table + compressed for table in (".csv", ".tsv") for compressed in ("", *COMPRESSED_SUFFIXES))
_KINDS = f"{', '.join((*TEXT_SUFFIXES, '.parquet'))} (text also with {' or '.join(COMPRESSED_SUFFIXES)})"
_LONGEST_REASON = 300


def read_rows(source: DataSource) -> Iterator[Row]:
    """Yield the rows of a source in the order of its files, at most `source.rows` of them.

    Raises:
        InputError: the source is missing or empty, or a row cannot be read; the message names the file and line. The
            path is checked when the function is called, and rows are read during iteration.
    """
    found = _open(source)
    return _require_rows(islice(found, source.rows), source)


def _open(source: DataSource) -> Iterator[Row]:
    name, shown = expand_user(source.path), shorten(source.path, _LONGEST_REASON)
    if "\0" in name:
        raise InputError(f"The data path {shown!r} contains a zero byte; correct it.")
    if os.path.isfile(name):  # unlike Path's method, False for names that the file system refuses
        return _read_file(Path(name), source)
    if os.path.isdir(name):
        if any(os.path.isfile(os.path.join(name, marker)) for marker in _SAVED_BY_DATASETS):
            return _read_saved(Path(name), source.split)
        return _read_files(_files_of_folder(Path(name), source), source)
    if is_uri(name):
        raise InputError(f"'{shown}' is a URI, but rows are read from local files and the hub; copy it to a file.")
    if glob.has_magic(name):
        matches = sorted(Path(match) for match in glob.glob(name, recursive=True) if os.path.isfile(match))
        if not matches:
            raise InputError(f"No file matches '{shown}'; check the pattern in the data section.")
        return _read_files(matches, source)
    if is_local_path(source.path):
        raise InputError(f"The data file or folder '{shown}' does not exist; check the path.")
    return _read_hub(source)


def local_files(source: DataSource) -> list[Path]:
    """Return the files that `read_rows` would read; [] for a data set on the hub or a missing source."""
    name = expand_user(source.path)
    if "\0" in name:
        return []
    if os.path.isfile(name):
        return [Path(name)]
    if os.path.isdir(name):
        if any(os.path.isfile(os.path.join(name, marker)) for marker in _SAVED_BY_DATASETS):
            return sorted(path for path in Path(name).rglob("*") if path.is_file())
        return _files_of_folder(Path(name), source)
    return sorted(Path(match) for match in glob.glob(name, recursive=True) if os.path.isfile(match))


def _require_rows(rows: Iterator[Row], source: DataSource) -> Iterator[Row]:
    first = next(rows, None)
    if first is None:
        raise InputError(f"'{source.path}' has no rows; give a source that has at least one.")
    yield first
    yield from rows


def _read_files(paths: list[Path], source: DataSource) -> Iterator[Row]:
    for path in paths:
        yield from _read_file(path, source)


def _read_file(path: Path, source: DataSource) -> Iterator[Row]:
    suffix = next((known for known in DATA_SUFFIXES if path.name.endswith(known)), None)
    if suffix is None:
        raise InputError(f"'{path}' is not a file type that rayk reads; give one of {_KINDS}.")
    if suffix == ".parquet":
        rows = _read_parquet(path)
    elif suffix.startswith(".json"):
        rows = read_json(lambda: _open_binary(path), str(path), source.split, _row_fields(source))
    else:
        rows = _read_table(path, "\t" if suffix.startswith(".tsv") else None)
    return _report_read_errors(rows, path)


def _report_read_errors(rows: Iterator[Row], path: Path) -> Iterator[Row]:
    """Yield `rows`; turn an OSError while reading them into an InputError that names `path`."""
    try:
        yield from rows
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {error.strerror or error}.") from error


def _open_binary(path: Path) -> BinaryIO:
    """Open a file, and decompress it while it is read if its name ends so."""
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    if compression is None:
        return open(path, "rb")
    import pyarrow as pa

    stream = pa.CompressedInputStream(pa.OSFile(str(path)), compression)
    return cast(BinaryIO, io.BufferedReader(stream, 1 << 16))


def _row_fields(source: DataSource) -> set[str]:
    """Return the fields that the settings of a source read, except tools."""
    fields = {
        source.prompt_field, source.completion_field, source.messages_field, source.chosen_field,
        source.rejected_field, source.text_field, SHAREGPT_FIELD,
    }  # fmt: skip
    templates = f"{source.prompt_template or ''}{source.completion_template or ''}"
    try:
        return fields | {name for _, name, _, _ in string.Formatter().parse(templates) if name}
    except ValueError:  # a malformed template is refused by `RowTexts`
        return fields


def _read_table(path: Path, delimiter: str | None) -> Iterator[Row]:
    with _open_binary(path) as file:
        yield from read_csv(file, str(path), delimiter)


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from rayk.data.arrow_rows import read_arrow

    try:
        with pq.ParquetFile(path) as file:
            yield from read_arrow(file.iter_batches(batch_size=_BATCH_ROWS), str(path))
    except UnicodeDecodeError as error:
        raise InputError(f"'{path}' has a name of a column that is not UTF-8 text; write the file again.") from error
    except pa.ArrowException as error:
        raise InputError(f"'{path}' is not a valid Parquet file: {_reason(error)}") from error


def _files_of_folder(folder: Path, source: DataSource) -> list[Path]:
    """Return the files of the split: those with its name in their path, or all if no path names a split.

    Tables (.csv, .tsv) beside other data files are left out, and compressed copies of files that are there too.
    """
    inside = folder / source.name if source.name and (folder / source.name).is_dir() else folder
    files = sorted(path for path in inside.rglob("*") if path.name.endswith(DATA_SUFFIXES) and path.is_file())
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(inside).parts)]
    files = [path for path in files if path.suffix not in COMPRESSED_SUFFIXES or path.with_suffix("") not in files]
    files = [path for path in files if not path.name.endswith(_TABLES)] or files
    if not files:
        raise InputError(f"The folder '{folder}' contains no data file, such as {_KINDS}; check the path.")
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
        raise InputError(f"'{folder}' cannot be loaded as a saved dataset: {_reason(error)}") from error
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
        shown, advice = shorten(source.path, _LONGEST_REASON), ""
        if isinstance(error, ConnectionError):
            advice = " Check the network, or give a local file or a folder saved by `datasets`."
        raise InputError(
            f"No dataset '{shown}' (split '{source.split}') could be loaded from a file or the hub: "
            f"{_reason(error)}{advice}"
        ) from error
    return _read_dataset(loaded, source.path)


def _read_dataset(dataset: Any, name: str) -> Iterator[Row]:
    from rayk.data.arrow_rows import read_arrow

    # as Arrow, because datasets would decode images and audio that no one reads
    yield from read_arrow(dataset.with_format("arrow").iter(batch_size=_BATCH_ROWS), name)


def _reason(error: Exception) -> str:
    """Return an error's message in one line."""
    text = shorten(" ".join(str(error).split()) or type(error).__name__, _LONGEST_REASON)
    return text if text.endswith(".") else text + "."
