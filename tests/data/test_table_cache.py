"""Large sources are tokenized in processes, as in one, and once for all starts."""

import json
import logging

import pytest

from rayk.config import DataConfig, DataSource
from rayk.config.paths import cache_folder
from rayk.data import table_cache
from rayk.data.table_cache import tokenize_once
from rayk.data.tokenizing import tokenize
from rayk.data.tokenizing_process import tokenize_in_processes
from rayk.errors import InputError
from tests.tiny import tiny_tokenizer

ROWS = 3500


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A file with rows of all lengths, some of them empty or too long, in several chunks."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with path.open("w") as file:
        for n in range(ROWS):
            completion = "" if n % 700 == 650 else f"Answer: {2 * n}" * (40 if n % 900 == 5 else 1 + n % 3)
            file.write(json.dumps({"prompt": f"Question: {n} + {n}?", "completion": completion}) + "\n")
    return path


@pytest.fixture
def settings(rows):
    source = DataSource(path=str(rows))
    return source, DataConfig(train=source, max_tokens=256, too_long="skip")


def kept_tables():
    return list((cache_folder() / "tokens").iterdir())


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Tables of any size are kept, in a folder of the test's own; yields the sources that were tokenized."""
    monkeypatch.setenv("RAYK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(table_cache, "_SMALL_BYTES", 0)
    tokenized, original = [], table_cache._tokenize

    def count(arguments, processes):
        tokenized.append(arguments["source"].path)
        return original(arguments, processes)

    monkeypatch.setattr(table_cache, "_tokenize", count)
    return tokenized


def arguments_of(settings, tokenizer):
    source, data = settings
    return {"source": source, "data": data, "tokenizer": tokenizer}


@pytest.mark.slow
def test_processes_return_the_table_of_one(settings, tokenizer, monkeypatch, tmp_path):
    expected = tokenize(*settings, tokenizer)
    monkeypatch.setenv("RAYK_CACHE", str(tmp_path))
    monkeypatch.setattr(table_cache, "_SMALL_BYTES", 0)
    monkeypatch.setattr(table_cache, "choose_processes", lambda files: 2)
    table = tokenize_once(*settings, tokenizer)
    assert table.fingerprint == expected.fingerprint and len(table) == len(expected) < ROWS
    assert table.skipped == expected.skipped and len(table.skipped) == 2
    assert table.ends == expected.ends
    assert table.table.equals(expected.table)
    _, counts = tokenize_in_processes(arguments_of(settings, tokenizer), 2)
    assert counts.first_skipped == {
        "empty completion": f"{settings[0].path}, line 651", "more than max_tokens": f"{settings[0].path}, line 906",
    }  # fmt: skip


@pytest.mark.slow
def test_the_first_wrong_row_of_all_processes_is_named(settings, tokenizer):
    source, data = settings
    strict = data.model_copy(update={"too_long": "error"})
    with pytest.raises(InputError, match=r"rows.jsonl, line 906 has \d+ tokens"):
        tokenize_in_processes(arguments_of((source, strict), tokenizer), 2)


def test_a_second_start_tokenizes_nothing(settings, tokenizer, kept, caplog):
    first = tokenize_once(*settings, tokenizer)
    with caplog.at_level(logging.WARNING):
        second = tokenize_once(*settings, tokenizer)
    assert len(kept) == 1 and second.fingerprint == first.fingerprint and second.table.equals(first.table)
    assert second.skipped == first.skipped and second[7].fields["prompt"] == "Question: 7 + 7?"
    assert "rows skipped: " in caplog.text  # said at every start
    assert [path.suffix for path in kept_tables()] == [".arrow"]


@pytest.mark.slow
def test_other_rows_settings_and_tokenizers_are_other_tables(settings, tokenizer, kept, rows, tmp_path):
    source, data = settings
    tokenize_once(source, data, tokenizer)
    tokenize_once(source, data.model_copy(update={"max_tokens": 128}), tokenizer)
    tokenize_once(source, data, tiny_tokenizer(vocab_size=300))
    tokenize_once(source, data, tokenizer, prompts_only=True)
    assert len(kept) == 4
    copy = tmp_path / "rows.jsonl"
    copy.write_text(rows.read_text().replace("Question: 9 ", "Question: 8 "))
    tokenize_once(DataSource(path=str(copy)), data, tokenizer)
    assert len(kept) == 5 and len(kept_tables()) == 5


def test_a_damaged_table_is_made_again(settings, tokenizer, kept):
    expected = tokenize_once(*settings, tokenizer)
    [path] = kept_tables()
    path.write_bytes(path.read_bytes()[:1000])
    assert tokenize_once(*settings, tokenizer).fingerprint == expected.fingerprint
    assert len(kept) == 2


def test_least_recently_used_tables_are_deleted(settings, tokenizer, kept, monkeypatch):
    tokenize_once(*settings, tokenizer)
    [old] = kept_tables()
    monkeypatch.setattr(table_cache, "_MOST_BYTES", int(1.5 * old.stat().st_size))
    tokenize_once(settings[0], settings[1].model_copy(update={"max_tokens": 250}), tokenizer)
    assert old not in kept_tables() and len(kept_tables()) == 1


def test_a_small_source_is_not_kept(settings, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYK_CACHE", str(tmp_path / "cache"))
    tokenize_once(*settings, tokenizer)
    assert not (tmp_path / "cache").exists()
