"""Files and folders are written completely or not at all."""

import resource
from contextlib import contextmanager

import pytest

from rayk.errors import InputError, RunFailed
from rayk.storage.atomic import remove_unfinished, replace_folder, write_whole


@contextmanager
def full_disk(limit=100):
    """Limit the size of each file; the error is like that of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced(tmp_path):
    path = tmp_path / "config.yaml"
    for content in (b"first", b"second"):
        write_whole(path, content)
        assert path.read_bytes() == content
    assert names(tmp_path) == ["config.yaml"]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "config.yaml"
    write_whole(path, b"first")
    with full_disk(), pytest.raises(RunFailed, match=f"^There is no space left in '{tmp_path}'"):
        write_whole(path, bytes(1_000))
    assert path.read_bytes() == b"first"
    assert names(tmp_path) == ["config.yaml"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(InputError, match=f"^'{tmp_path / 'none'}' cannot be written: No such file"):
        write_whole(tmp_path / "none" / "file", b"")


def test_files_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / "part.parquet.unfinished").write_bytes(b"half")
    write_whole(tmp_path / "part.parquet", b"whole")
    remove_unfinished(tmp_path)
    assert names(tmp_path) == ["part.parquet"]


def test_a_folder_is_replaced_at_the_end(tmp_path):
    model = tmp_path / "model"
    for content in ("first", "second"):
        with replace_folder(model) as folder:
            (folder / f"{content}.txt").write_text(content)
            assert not (model / f"{content}.txt").exists()
        assert names(model) == [f"{content}.txt"]
    assert names(tmp_path) == ["model"]


def test_after_an_error_the_old_folder_stays(tmp_path):
    model = tmp_path / "model"
    with replace_folder(model) as folder:
        (folder / "weights").write_bytes(b"old")
    with full_disk(), pytest.raises(RunFailed), replace_folder(model) as folder:
        (folder / "weights").write_bytes(bytes(1_000))
    with pytest.raises(ZeroDivisionError), replace_folder(model):
        raise ZeroDivisionError
    assert (model / "weights").read_bytes() == b"old"
    assert names(tmp_path) == ["model"]


def test_folders_of_a_killed_process_do_not_get_in_the_way(tmp_path):
    for suffix in ("unfinished", "replaced"):
        (tmp_path / f"model.{suffix}").mkdir()
        (tmp_path / f"model.{suffix}" / "weights").write_bytes(b"half")
    with replace_folder(tmp_path / "model") as folder:
        assert names(folder) == []
        (folder / "weights").write_bytes(b"new")
    assert names(tmp_path) == ["model"]
