"""An answer is right when the pattern finds in it what it finds in the truth."""

import numpy as np
import pytest

from rayk.config import EvaluationConfig
from rayk.data.examples import Example
from rayk.errors import InputError
from rayk.evaluation.answers import AnswerScorer
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def example(prompt="2 + 2 =", completion=" so it is\n#### 4", **fields):
    prompt_ids, ids = TOKENIZER(prompt).input_ids, TOKENIZER(prompt + completion).input_ids
    counted = np.arange(len(ids)) >= len(prompt_ids)
    return Example(np.asarray(ids, np.int32), counted, None, len(prompt_ids), "rows.jsonl, line 1", fields)


def score(text, row=None, **settings):
    return AnswerScorer(EvaluationConfig(**settings), TOKENIZER).score(row or example(), text, "stop", 3)


def test_without_a_pattern_the_whole_text_counts_white_space_folded():
    assert score("so  it is #### 4\n").correct
    assert not score("so it is #### 5").correct


def test_with_a_pattern_the_last_match_counts():
    pattern = {"answer_pattern": "#### (.+)"}
    assert score("I think #### 5, no:\n####  4 ", **pattern).correct
    assert not score("#### 4\n#### 5", **pattern).correct
    assert not score("it is 4", **pattern).correct


def test_the_truth_may_be_a_field_of_the_row():
    answer = score("4", example(answer=4), answer_field="answer")
    assert answer.correct
    assert (answer.truth, answer.prompt, answer.tokens) == ("4", "2 + 2 =", 3)


def test_a_truth_that_is_missing_is_named():
    with pytest.raises(InputError, match=r"^rows.jsonl, line 1 has no field 'sum'; set evaluation.answer_field.$"):
        score("4", example(answer=4), answer_field="sum")


def test_a_truth_without_an_answer_is_named():
    with pytest.raises(
        InputError, match=r"^rows.jsonl, line 1: evaluation.answer_pattern '#### \(\\\\d\+\)' finds nothing"
    ):
        score("#### 4", example(completion=" four"), answer_pattern=r"#### (\d+)")
