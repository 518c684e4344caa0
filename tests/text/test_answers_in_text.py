"""Answers are found by type in what models really write."""

import pytest

from rayk.text.answers import answer_in, matched, same_answer


@pytest.mark.parametrize(
    ("kind", "text", "answer"),
    [
        ("number", "She has 1,000 apples", "1000"),
        ("number", "1,234,567.50 dollars", "1234567.5"),
        ("number", "first 1, 2 and then 3", "3"),  # commas of a list part no thousands
        ("number", "12,34", "34"),
        ("number", "5-3 = 2.", "2"),
        ("number", "10-3", "3"),  # an operator is no sign
        ("number", "-$5.50", "-5.5"),
        ("number", "$-5", "-5"),
        ("number", "it falls to −7 degrees", "-7"),
        ("number", "3e2", "300"),
        ("number", "10.0", "10"),
        ("number", "0.000", "0"),
        ("number", ".5", "0.5"),
        ("number", "none", None),
        ("choice", "A man (b) or (C)", "C"),
        ("choice", "A man chose B.", "B"),
        ("choice", "A", "A"),
        ("choice", "DAB", None),
        ("choice", "F", None),
        ("yes_no", "Nothing is known", None),
        ("yes_no", "No. Wait, YES!", "yes"),
        ("date", "on May 3rd, 2021", "2021-05-03"),
        ("date", "Sept. 4 2020", "2020-09-04"),
        ("date", "23 december 1943", "1943-12-23"),
        ("date", "05/23/1943", "1943-05-23"),
        ("date", "23/05/1943", "1943-05-23"),
        ("date", "2021-02-30", None),
        ("free", '  "Paris" .\nThe capital.', "Paris"),
        ("free", "...\n\n", None),
    ],
)
def test_each_type_is_found(kind, text, answer):
    assert answer_in(text, kind) == answer


def test_after_a_delimiter_the_first_candidate_counts_and_without_one_the_last():
    assert answer_in("2 and 3 --> 7, not 8", "number") == "7"
    assert answer_in("7 --> 8 --> 9", "number") == "8"
    assert answer_in("2 and 3 make 5", "number") == "5"
    assert answer_in("72. Q: 3", "number", continues=True) == "72"


@pytest.mark.parametrize("trigger", ["Therefore, the answer is", "Therefore the answer is", "So the final answer is:"])
def test_the_comma_of_therefore_is_not_insisted_on(trigger):
    assert answer_in(f"1 and 2. {trigger} 42. 7 is not.", "number") == "42"


def test_choices_may_be_others():
    assert answer_in("(F)", "choice", choices="ABCDEF") == "F"
    assert answer_in("B or C", "choice", choices="BC") == "C"


def test_numbers_are_the_same_to_a_millionth_and_text_whatever_its_case():
    assert same_answer("2", "2.0000001", "number")
    assert not same_answer("2", "2.00001", "number")
    assert same_answer("Straße", "STRASSE", "free")
    assert not same_answer("A", "B", "choice")


def test_a_pattern_finds_its_last_match():
    assert matched("x\n#### 1\n####  1,000 ", "#### (.+)") == "1,000"
    assert matched("none", "#### (.+)") is None
    assert matched(" a\n b ", None) == "a b"
