"""Plain text in chunks: one sequence of all texts, cut anew in each pass at another offset."""

import numpy as np
import pytest

from rayk.config import DataConfig, DataSource, parse_config
from rayk.data import make_batches
from rayk.data.batches import BatchSampler
from rayk.data.chunks import OffsetChunks, open_rows
from rayk.data.tokenizing import tokenize
from rayk.errors import InputError
from tests.runs import settings
from tests.tiny import tiny_tokenizer

TEXTS = [
    f"the cat number {number} sat on the mat" + " and the dog sat on the log" * (number % 4) for number in range(20)
]
SIZE = 16


def write_texts(path):
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in TEXTS))
    return str(path)


@pytest.fixture(scope="module")
def stream():
    """The ids of all texts, each with EOS."""
    tokenizer = tiny_tokenizer()
    return np.concatenate([[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in TEXTS])


@pytest.fixture
def table(tmp_path):
    source = DataSource(path=write_texts(tmp_path / "texts.jsonl"), chunk_tokens=SIZE)
    # Texts may be longer than max_tokens, which limits rows.
    return tokenize(source, DataConfig(train=source, max_tokens=SIZE), tiny_tokenizer())


def test_chunks_are_the_texts_one_after_the_other(table, stream):
    assert table.longest == SIZE
    assert np.array_equal(np.concatenate([row.input_ids for row in table]), stream)
    assert set(table.lengths[:-1]) == {SIZE} and table.lengths[-1] == len(stream) % SIZE
    assert all(not row.counted[0] and row.counted[1:].all() for row in table)
    assert table[2].where.endswith("token 33")


def test_each_pass_has_the_whole_text_from_another_offset(table, stream):
    rows = OffsetChunks(table, SIZE, seed=3)
    starts = []
    for number in range(8):
        chunks = np.concatenate([rows[number * len(rows) + chunk].input_ids for chunk in range(len(rows))])
        [start] = [offset for offset in range(SIZE) if np.array_equal(stream[offset : offset + len(chunks)], chunks)]
        assert len(stream) - len(chunks) < 2 * SIZE - 1
        starts.append(start)
    assert len(set(starts)) > 3
    assert np.array_equal(OffsetChunks(table, SIZE, seed=3)[5].input_ids, rows[5].input_ids)
    assert not np.array_equal(OffsetChunks(table, SIZE, seed=4)[0].input_ids, rows[0].input_ids)


def test_rows_of_later_passes_have_numbers_of_their_own():
    lengths = np.full(6, SIZE)
    plain, renewed = (BatchSampler(lengths, 4, 0, 6, renews=renews) for renews in (False, True))
    for step in range(6):
        positions = np.arange(4 * step, 4 * step + 4)
        assert np.array_equal(renewed.rows(step), plain.rows(step) + 6 * (positions // 6))
        shares = np.concatenate([renewed.share(step, rank, 2) for rank in (0, 1)])
        assert sorted(shares) == sorted(renewed.rows(step))


def test_text_that_cannot_be_cut_is_refused(table, tmp_path):
    with pytest.raises(InputError, match="too few for chunks of 1000"):
        OffsetChunks(table, 1000, 0)
    rows = [{"prompt": "2 + 2?", "completion": "4"}]
    with pytest.raises(InputError, match="chunk_tokens cuts plain text, but the rows of 'rows' have prompts"):
        make_batches(rows, tiny_tokenizer(), 1, chunk_tokens=8)
    with pytest.raises(InputError, match="random_offset changes the rows of each pass"):
        make_batches([{"text": "the cat"}], tiny_tokenizer(), 1, chunk_tokens=2, random_offset=True)
    values = settings(tmp_path, "student")
    for data, said in (
        ({"train": {"path": "rows", "random_offset": True}}, "set that too"),
        (
            {"train": {"path": "rows"}, "evaluation": {"path": "rows", "chunk_tokens": 8, "random_offset": True}},
            "other",
        ),
    ):
        with pytest.raises(InputError, match=said):
            parse_config(values | {"data": data})
    assert open_rows(table, DataSource(path="rows", chunk_tokens=SIZE), 0) is table
