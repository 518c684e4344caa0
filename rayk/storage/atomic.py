"""Write files and folders completely or not at all: under another name first, then renamed."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from rayk.errors import InputError, RunFailed

_UNFINISHED = ".unfinished"
_REPLACED = ".replaced"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file and sync it to disk. Readers see an existing file unchanged until the new one replaces it whole.

    Raises:
        RunFailed: the disk is full.
        InputError: the folder cannot be written.
    """
    with disk_errors(path.parent):
        with replace_file(path) as unfinished, unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def replace_file(path: Path, writer: str = "") -> Iterator[Path]:
    """Yield the path of a file to write; at the end of the block it replaces `path`.

    If the block raises an exception, the new file is removed and an existing `path` is unchanged.

    Args:
        writer: a text of this process's own, if several processes may write the file at the same time.

    Raises:
        OSError: the folder cannot be written.
    """
    unfinished = path.with_name(f"{path.name}{writer}{_UNFINISHED}")
    try:
        yield unfinished
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write to; at the end of the block it replaces `folder`.

    If the block raises an exception, the new folder is removed and an existing `folder` is unchanged.

    Raises:
        RunFailed: the disk is full.
        InputError: the parent folder cannot be written.
    """
    unfinished, replaced = (folder.with_name(folder.name + suffix) for suffix in (_UNFINISHED, _REPLACED))
    with disk_errors(folder.parent):
        for leftover in (unfinished, replaced):  # of a killed process
            shutil.rmtree(leftover, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            yield unfinished
            if folder.exists():
                folder.rename(replaced)
            unfinished.rename(folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        shutil.rmtree(replaced, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Remove the unfinished files in `folder` of processes that were killed in `write_whole`."""
    for unfinished in folder.glob(f"*{_UNFINISHED}"):
        unfinished.unlink()


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Translate an OSError of the block into InputError or RunFailed.

    Raises:
        RunFailed: the disk is full.
        InputError: `folder` cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise RunFailed(
                f"There is no space left in '{folder}' ({error.strerror}); earlier files are kept. Free some space and "
                "run again: the run continues from there."
            ) from error
        raise InputError(f"'{folder}' cannot be written: {error.strerror or error}.") from error
