"""The one definition of a local path: which names mean files on this machine, and where relative ones are looked up."""

import glob
import os
from pathlib import Path

DATA_SUFFIXES = (".jsonl", ".json", ".parquet")


def is_uri(place: str) -> bool:
    """Return whether `place` is a URI, such as s3://bucket/folder."""
    return "://" in place


def is_local_path(name: str) -> bool:
    """Return whether `name` means a local path and not a name on the Hugging Face hub.

    A local path begins with '/', '.' or '~', has more than one '/', ends like a data file, is a glob pattern, or
    exists in the current folder.
    """
    if is_uri(name):
        return False
    return (
        name.startswith(("/", ".", "~"))
        or name.count("/") > 1
        or name.endswith(DATA_SUFFIXES)
        or glob.has_magic(name)
        or os.path.exists(name)
    )


def absolute_path(name: str, folder: str | os.PathLike | None = None) -> str:
    """Return `name` as an absolute path; a relative one is taken from `folder`, by default the current folder."""
    return os.path.abspath(Path(folder or os.getcwd(), os.path.expanduser(name)))


def path_exists(name: str) -> bool:
    """Return whether a file or folder of this name exists, or a file matches where it is a glob pattern."""
    return os.path.exists(name) or (glob.has_magic(name) and next(glob.iglob(name, recursive=True), None) is not None)
