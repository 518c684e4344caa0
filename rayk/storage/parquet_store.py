"""An append-only store of rows in numbered Parquet files of one folder, with access by key."""

import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayk.errors import InputError
from rayk.storage.atomic import disk_errors, remove_unfinished, write_whole

logger = logging.getLogger(__name__)

_MERGED_FILES = 64


class ParquetStore:
    """Rows in numbered Parquet files of one folder, with access by their column `key`.

    Args:
        folder: `load` creates and reads it.
        schema: schema of the rows.
    """

    def __init__(self, folder: Path, schema: pa.Schema):
        self.folder = folder
        self._schema = schema
        self._tables: list[pa.Table] = []
        self._places: dict[str, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def find(self, key: str, columns: Sequence[str]) -> tuple[Any, ...] | None:
        """Return the values of `columns` in the row with this key; None if there is no such row."""
        if key not in self._places:
            return None
        table, place = self._places[key]
        return tuple(self._tables[table].column(name)[place].as_py() for name in columns)

    def load(self) -> None:
        """Read the rows of the folder, and merge its files if there are many.

        A damaged file is renamed to `.damaged` with a warning, and its rows are missing.

        Raises:
            InputError: the folder cannot be written, or a file cannot be read at the moment.
        """
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_unfinished(self.folder)
            paths = self._paths()
            for path in paths:
                table = self._read(path)
                if table is not None:
                    self._add_table(table)
            if len(paths) > _MERGED_FILES:
                self._merge(paths)

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows to a new file.

        Raises:
            RunFailed: the disk is full.
            InputError: the folder cannot be written.
        """
        table = pa.Table.from_pylist(list(rows), self._schema)
        self._write(table)
        self._add_table(table)

    def _read(self, path: Path) -> pa.Table | None:
        try:
            return read_parquet(path, self._schema)
        except (pa.ArrowException, OSError, KeyError) as error:
            path.rename(path.with_suffix(".damaged"))
            logger.warning(
                "'%s' is damaged (%s) and was renamed to '.damaged'; its rows are requested again.",
                path, str(error).splitlines()[0],
            )  # fmt: skip
            return None

    def _merge(self, paths: list[Path]) -> None:
        """Merge all files into one. If the process is killed before the end, rows are duplicated, which is harmless."""
        self._write(pa.concat_tables(self._tables))
        for path in paths:
            path.unlink(missing_ok=True)

    def _write(self, table: pa.Table) -> None:
        # Do not use the number of a damaged file again: if the new file is damaged too, it would overwrite that one.
        existing = (*self._paths(), *self.folder.glob("part-*.damaged"))
        numbers = (int(path.stem.split("-")[1]) for path in existing)
        write_whole(self.folder / f"part-{max(numbers, default=0) + 1:06d}.parquet", parquet_bytes(table))

    def _add_table(self, table: pa.Table) -> None:
        self._tables.append(table.combine_chunks())
        number = len(self._tables) - 1
        self._places |= {key: (number, place) for place, key in enumerate(table.column("key").to_pylist())}

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.parquet"))


def read_parquet(path: Path, schema: pa.Schema) -> pa.Table:
    """Read the columns of `schema` from a Parquet file.

    Raises:
        ArrowException, OSError, KeyError: the file is damaged.
        InputError: the file cannot be read at the moment, which does not mean that it is damaged.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"'{path}' cannot be read ({error.strerror}); make it readable and run again. Its rows may have cost money "
            "and would be requested again if the file were removed."
        ) from error
    return pq.read_table(pa.BufferReader(content), page_checksum_verification=True).select(schema.names)


def parquet_bytes(table: pa.Table) -> bytes:
    """Return `table` as a Parquet file with checksums."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()
