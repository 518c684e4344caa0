"""Exact match and F1 decide as SQuAD's evaluation script."""

import pytest

from rayk.text.squad import exact_match, f1


@pytest.mark.parametrize(
    ("one", "other", "exact", "overlap"),
    [
        ("The Cat!", "cat", 1, 1),
        ("a cat sat", "the cat", 0, 2 / 3),
        ("cat cat", "cat", 0, 2 / 3),
        ("dog", "cat", 0, 0),
        ("the", "!", 1, 1),
        ("", "cat", 0, 0),
    ],
)
def test_short_answers_are_compared_without_case_punctuation_and_articles(one, other, exact, overlap):
    assert (exact_match(one, other), f1(one, other)) == (exact, pytest.approx(overlap))
