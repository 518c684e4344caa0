"""Answers are found by type in texts as models generate them."""

import pytest

from rayk.text.answers import answers_match, find_answer, find_last_match


@pytest.mark.parametrize(
    ("kind", "text", "answer"),
    [
        ("number", "She has 1,000 apples", "1000"),
        ("number", "1,234,567.50 dollars", "1234567.5"),
        ("number", "first 1, 2 and then 3", "3"),  # a comma in a list does not separate thousands
        ("number", "12,34", "34"),
        ("number", "5-3 = 2.", "2"),
        ("number", "10-3", "3"),  # an operator is not a sign
        ("number", "\n- 42 apples", "42"),  # nor is a bullet point
        ("number", "Well...42", "42"),  # and dots do not start a fraction
        ("number", "No.5", "5"),
        ("choice", "Not (A). B is too large: C", "C"),
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
    assert find_answer(text, kind) == answer


def test_after_a_delimiter_the_first_candidate_counts_and_without_one_the_last():
    assert find_answer("2 and 3 --> 7, not 8", "number") == "7"
    assert find_answer("7 --> 8 --> 9", "number") == "8"
    assert find_answer("2 and 3 make 5", "number") == "5"
    assert find_answer("72. Q: 3", "number", continues=True) == "72"


@pytest.mark.parametrize("trigger", ["Therefore, the answer is", "Therefore the answer is", "So the final answer is:"])
def test_the_comma_after_therefore_is_optional(trigger):
    assert find_answer(f"1 and 2. {trigger} 42. 7 is not.", "number") == "42"


def test_the_first_letter_counts_before_one_in_brackets():
    assert find_answer(" C, because (A) is too small.", "choice", continues=True) == "C"
    assert find_answer("B. (A) is wrong", "choice", continues=True) == "B"


def test_other_choices_can_be_given():
    assert find_answer("(F)", "choice", choices="ABCDEF") == "F"
    assert find_answer("B or C", "choice", choices="BC") == "C"


def test_numbers_match_to_a_millionth_and_text_ignores_case():
    assert answers_match("2", "2.0000001", "number")
    assert not answers_match("2", "2.00001", "number")
    assert answers_match("Straße", "STRASSE", "free")
    assert not answers_match("A", "B", "choice")


def test_a_pattern_finds_its_last_match():
    assert find_last_match("x\n#### 1\n####  1,000 ", "#### (.+)") == "1,000"
    assert find_last_match("none", "#### (.+)") is None
    assert find_last_match(" a\n b ", None) == "a b"
