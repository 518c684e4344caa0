"""The definition of a local path: which names mean files on this machine, and which folder relative ones start from."""

import glob
import os
from pathlib import Path

RUN_CONFIG = "config.yaml"
"""The file with the settings of a run, in its directory."""
TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
"""Suffixes of data files that are text."""
COMPRESSED_SUFFIXES = (".gz", ".zst")
DATA_SUFFIXES = (
    *TEXT_SUFFIXES, ".parquet", *(text + compressed for compressed in COMPRESSED_SUFFIXES for text in TEXT_SUFFIXES)
)  # fmt: skip
_FILE_SUFFIXES = (*DATA_SUFFIXES, ".jinja")


def is_uri(place: str) -> bool:
    """Return whether `place` is a URI, such as s3://bucket/folder."""
    return "://" in place


def is_explicit_path(name: str) -> bool:
    """Return whether `name` can only be a path: it begins with '/', '.' or '~', ends like a data file or a template,
    or is a glob pattern."""
    is_path = name.startswith(("/", ".", "~")) or name.endswith(_FILE_SUFFIXES) or glob.has_magic(name)
    return is_path and not is_uri(name)


def is_local_path(name: str) -> bool:
    """Return whether `name` means a local path and not a name on the Hugging Face hub: it is explicitly a path, exists,
    or has more than one '/', which no name on the hub has."""
    return is_explicit_path(name) or (not is_uri(name) and (name.count("/") > 1 or path_exists(name)))


def absolute_path(name: str, folder: str | os.PathLike | None = None) -> str:
    """Return `name` as an absolute path; a relative one is taken from `folder`, by default the current folder."""
    return os.path.abspath(Path(folder or os.getcwd(), expand_user(name)))


def expand_user(name: str) -> str:
    """Return `name` with the home folder for `~` or `~user`; unchanged if it is no name of a file at all."""
    try:
        return os.path.expanduser(name)
    except ValueError:  # a zero byte, or half of a surrogate pair
        return name


def resolve_path(name: str) -> str:
    """Return `name` as an absolute path if it is explicitly a path or exists in the current folder; else unchanged, as
    it may be a name on a hub or at an endpoint."""
    return absolute_path(name) if is_explicit_path(name) or path_exists(name) else name


def path_exists(name: str) -> bool:
    """Return whether a file or folder of this name exists; for a glob pattern, whether any file matches."""
    name = expand_user(name)
    try:
        return os.path.exists(name) or (
            glob.has_magic(name) and next(glob.iglob(name, recursive=True), None) is not None
        )
    except ValueError:  # a pattern with a zero byte
        return False


def cache_folder() -> Path:
    """Return the folder for what later runs reuse: `RAYK_CACHE`, by default `~/.cache/rayk`."""
    own = os.environ.get("RAYK_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(own).expanduser() if own else base / "rayk"


def place_below(place: str, name: str) -> str:
    """Return the folder `name` in a folder or at a URI, whose query stays at its end."""
    head, mark, query = _split_query(place)
    return f"{head.rstrip('/')}/{name}{mark}{query}"


def place_beside(place: str, suffix: str) -> str:
    """Return the folder or URI whose name is that of `place` with `suffix`; the query of a URI stays at its end."""
    head, mark, query = _split_query(place)
    return f"{head.rstrip('/')}{suffix}{mark}{query}"


def _split_query(place: str) -> tuple[str, str, str]:
    return place.partition("?") if is_uri(place) else (place, "", "")
