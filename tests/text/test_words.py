import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.tokenize import tokenize

from rayk.text import words
from rayk.text.words import ngrams


@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_text_has_the_tokens_of_rouge_score(text):
    assert words(text) == tokenize(text, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("写一首诗。", ["写", "一", "首", "诗"]),
        ("用Python3写 12 行", ["用", "python3", "写", "12", "行"]),
        ("猫について。ガ", ["猫", "に", "つ", "い", "て", "ガ"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("Напиши стих", ["напиши", "стих"]),
        ("खाना पकाना", ["खाना", "पकाना"]),
        ("한국어 시", ["한국어", "시"]),
        ("Cafe\u0301 CAFÉ", ["café", "café"]),
        ("ABC １２", ["abc", "12"]),
        ("don’t snake_case", ["don", "t", "snake", "case"]),
        ("... — ！？ 🎉", []),
    ],
)
def test_words_of_other_scripts(text, expected):
    assert words(text) == expected


@given(st.text())
def test_every_letter_and_digit_is_in_one_word(text):
    found = words(text)
    letters = [character for character in "".join(found) if character.isalnum()]
    assert letters == [character for character in unicodedata.normalize("NFKC", text).lower() if character.isalnum()]


def test_ngrams():
    assert list(ngrams(["a", "b", "c"], 2)) == [("a", "b"), ("b", "c")]
    assert list(ngrams(["a"], 2)) == []
