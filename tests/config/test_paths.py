"""One definition of a local path."""

import pytest

from rayk.config.paths import absolute_path, is_explicit_path, is_local_path, is_uri, path_exists, resolve_path


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("/a", True), ("./a", True), ("../a", True), ("~/a", True), ("a/b/c", True), ("rows.jsonl", True),
        ("rows/*.parquet", True), ("here", True), ("org/model", False), ("model", False), ("s3://bucket/a", False),
    ],
)  # fmt: skip
def test_local_paths_are_distinguished_from_names_on_the_hub(tmp_path, monkeypatch, name, local):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert is_local_path(name) == local


def test_relative_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("")
    assert absolute_path("x/../y") == str(tmp_path / "y")
    assert absolute_path("y", tmp_path / "z") == str(tmp_path / "z" / "y")
    assert absolute_path("/y", tmp_path) == "/y"
    assert path_exists("*.jsonl")
    assert not path_exists("*.parquet")
    assert is_uri("gs://a")


def test_only_explicit_or_existing_paths_are_resolved(tmp_path, monkeypatch):
    """An endpoint's name for a model may have any number of slashes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert resolve_path("accounts/provider/models/small") == "accounts/provider/models/small"
    assert not is_explicit_path("accounts/provider/models/small")
    assert resolve_path("here") == str(tmp_path / "here")
    assert resolve_path("rows.jsonl") == str(tmp_path / "rows.jsonl")
