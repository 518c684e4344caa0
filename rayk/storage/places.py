"""Folders on any file system that pyarrow knows."""

import os
import shutil
from pathlib import Path
from uuid import uuid4

from pyarrow import fs

from rayk.config.paths import is_uri
from rayk.config.secrets import hide, without_masks

_BLOCK_BYTES = 16 << 20


def open_place(location: str) -> tuple[fs.FileSystem, str]:
    """Return the file system of a folder or URI (s3://…, gs://…), and the folder's path in it.

    Raises:
        ValueError, OSError: pyarrow does not know the URI, or cannot use it; without the credentials in it.
    """
    if not is_uri(location):
        return fs.LocalFileSystem(), os.path.abspath(location)
    try:
        file_system, folder = fs.FileSystem.from_uri(without_masks(location))
    except (ValueError, OSError) as error:
        raise type(error)(hide(str(error))) from None
    return file_system, folder.rstrip("/")


def file_names(file_system: fs.FileSystem, folder: str) -> list[str]:
    """Return the names of all files in a folder and below, relative to it; none if it does not exist."""
    selector = fs.FileSelector(folder, allow_not_found=True, recursive=True)
    return [info.path[len(folder) + 1 :] for info in file_system.get_file_info(selector) if info.is_file]


def check_place(location: str) -> None:
    """Write a file in a folder or at a URI, and delete it.

    Raises:
        ValueError, OSError: this fails.
    """
    file_system, folder = open_place(location)
    if isinstance(file_system, fs.LocalFileSystem):
        file_system.create_dir(folder, recursive=True)
    file = f"{folder}/writable-{uuid4().hex[:8]}"
    with file_system.open_output_stream(file):
        pass
    file_system.delete_file(file)


def copy_folder(source: Path, location: str, last: str) -> None:
    """Copy all files of a local folder to a folder or URI, and delete all other files there.

    An object store renames no folder. So the file `last`, without which the folder cannot be used, is deleted first and
    written last: a reader finds it only beside the files that belong to it.

    Raises:
        ValueError, OSError: `location` cannot be written.
    """
    file_system, folder = open_place(location)
    names = sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file())
    names.sort(key=lambda name: name == last)
    for name in sorted(file_names(file_system, folder), key=lambda name: name != last):
        if name == last or name not in names:
            file_system.delete_file(f"{folder}/{name}")
    for name in names:
        target = f"{folder}/{name}"
        if isinstance(file_system, fs.LocalFileSystem):
            file_system.create_dir(os.path.dirname(target), recursive=True)
        with (source / name).open("rb") as file, file_system.open_output_stream(target) as stream:
            shutil.copyfileobj(file, stream, _BLOCK_BYTES)


def first_line(error: Exception) -> str:
    """Return the first line of an error of another library, without its period and without secrets."""
    return hide(str(error).splitlines()[0] if str(error) else type(error).__name__).rstrip(".")
