"""A teacher compares its token ids with those of batches that a user makes."""

from dataclasses import replace

import pytest

import rayk
from rayk.engines.transformers import TransformersEngine
from rayk.errors import InputError
from rayk.teachers.token_ids import TokenIdCheck
from tests.tiny import tiny_sentencepiece, tiny_tokenizer

ROWS = [{"prompt": "2 + 2?", "completion": "4"}]


def batch_of(tokenizer):
    (batch,) = rayk.make_batches(ROWS, tokenizer, 1)
    return batch


@pytest.fixture(scope="module")
def info(tiny_teacher):
    return TransformersEngine(tiny_teacher).info


@pytest.fixture
def check(info):
    return TokenIdCheck("teacher", info, False)


def test_equal_ids_pass(check):
    check.check(batch_of(tiny_tokenizer()))
    check.check(batch_of(tiny_tokenizer()).sequences)


def test_a_token_that_the_teacher_lacks_is_no_difference(check):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<call>"])
    check.check(batch_of(tokenizer))


def test_other_ids_are_refused_each_time(check):
    batch = batch_of(tiny_sentencepiece())
    for part in (batch, batch, batch.select([0])):
        with pytest.raises(InputError, match="the tokenizer of the batches give tokens different ids"):
            check.check(part)


def test_a_teacher_whose_tokenizer_cannot_be_loaded_is_named(info, tmp_path, caplog):
    check = TokenIdCheck("teacher", replace(info, model=str(tmp_path)), False)
    check.check(batch_of(tiny_sentencepiece()))
    assert "Teacher 'teacher' has another tokenizer than the batches" in caplog.text
