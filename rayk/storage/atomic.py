"""Write files whole or not at all: under another name, synced, then renamed."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from rayk.errors import InputError, RunFailed

_UNFINISHED = ".unfinished"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all.

    Raises:
        RunFailed: the disk is full.
        InputError: the folder cannot be written.
    """
    part = path.with_name(path.name + _UNFINISHED)
    with disk_errors(path.parent):
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


def remove_unfinished(folder: Path) -> None:
    """Remove what a kill has left of `write_whole`."""
    for left_over in folder.glob(f"*{_UNFINISHED}"):
        left_over.unlink()


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Say in a sentence what the disk does not take.

    Raises:
        RunFailed: it is full.
        InputError: `folder` cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise RunFailed(
                f"No room is left in '{folder}' ({error.strerror}); what was written before is kept. Make room and run "
                "again: it goes on from there."
            ) from error
        raise InputError(f"'{folder}' cannot be written: {error.strerror}.") from error
