"""Rows of an embedding without a token must have no probability, wherever they are."""

import numpy as np
import pytest
import torch

from rayk.engines.padding import check_padding, ids_without_token
from rayk.errors import InputError
from rayk.run import distill
from tests.runs import config
from tests.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SIZE = len(TOKENIZER)


class WithHole:
    """A tokenizer that lacks the token of id 9."""

    def get_vocab(self):
        return {token: number for token, number in TOKENIZER.get_vocab().items() if number != 9}


def model_with(*rows, factor=30.0):
    """Return a model whose head has large weights in `rows`."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[list(rows)] *= factor
    return model


def test_ids_without_a_token_are_holes_and_padding():
    assert ids_without_token(WithHole(), SIZE + 2).tolist() == [9, SIZE, SIZE + 1]


@pytest.mark.parametrize("row", [9, 383])
def test_a_probable_hole_or_padding_is_refused(row):
    check_padding(model_with(), WithHole(), "big")
    with pytest.raises(InputError, match=r"^The embedding of big has 384 rows .* set the rows without a token to zero"):
        check_padding(model_with(row), WithHole(), "big")
    check_padding(model_with(10), WithHole(), "big")  # a token


def test_a_student_with_probable_padding_is_refused_before_its_first_step(tmp_path):
    model_with(*np.arange(SIZE, 384)).save_pretrained(tmp_path / "student")
    TOKENIZER.save_pretrained(tmp_path / "student")
    with pytest.raises(InputError, match="The embedding of student.model"):
        distill(config(tmp_path, str(tmp_path / "student")))
