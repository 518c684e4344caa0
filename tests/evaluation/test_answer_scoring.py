"""An answer is correct if the pattern finds the same text in it as in the truth; further metrics are averaged."""

import sys

import numpy as np
import pytest

from rayk.config import EvaluationConfig
from rayk.data.examples import Example
from rayk.errors import InputError
from rayk.evaluation.answer_scoring import AnswerScorer
from rayk.evaluation.evaluate import Evaluation
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def example(prompt="2 + 2 =", completion=" so it is\n#### 4", **fields):
    prompt_ids, ids = TOKENIZER(prompt).input_ids, TOKENIZER(prompt + completion).input_ids
    counted = np.arange(len(ids)) >= len(prompt_ids)
    return Example(np.asarray(ids, np.int32), counted, None, len(prompt_ids), "rows.jsonl, line 1", fields)


def score(text, row=None, **settings):
    return AnswerScorer(EvaluationConfig(**settings), TOKENIZER).score(row or example(), text, "stop", 3)


def test_without_a_pattern_whole_texts_are_compared_with_normalized_white_space():
    assert score("so  it is #### 4\n").correct
    assert not score("so it is #### 5").correct


def test_last_match_of_the_pattern_counts():
    pattern = {"answer_pattern": "#### (.+)"}
    assert score("I think #### 5, no:\n####  4 ", **pattern).correct
    assert not score("#### 4\n#### 5", **pattern).correct
    assert not score("it is 4", **pattern).correct


def test_truth_can_be_a_field_of_the_row():
    answer = score("4", example(answer=4), answer_field="answer")
    assert answer.correct
    assert (answer.truth, answer.prompt, answer.tokens) == ("4", "2 + 2 =", 3)


def test_missing_truth_is_an_error_that_names_the_row():
    with pytest.raises(InputError, match=r"^rows.jsonl, line 1 has no field 'sum'; set evaluation.answer_field.$"):
        score("4", example(answer=4), answer_field="sum")


def test_truth_without_an_answer_is_an_error_that_names_the_row():
    with pytest.raises(
        InputError, match=r"^rows.jsonl, line 1: evaluation.answer_pattern '#### \(\\\\d\+\)' finds nothing"
    ):
        score("#### 4", example(completion=" four"), answer_pattern=r"#### (\d+)")


GENERATION = {"max_new_tokens": 4}


def test_metrics_are_averaged_over_answers_by_name(monkeypatch, tmp_path):
    code = "def shares_letter(completion, row):\n    return len(set(completion) & set(row['letters'])) > 0\n"
    (tmp_path / "own_metrics.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    metrics = {"metrics": ["rouge_l", "own_metrics:shares_letter"], "generation": GENERATION}
    evaluation = Evaluation()
    for text, letters in (("so it is #### 4", "xyz"), ("no", "n"), ("so it", "s")):
        evaluation.add_answer(score(text, example(letters=letters), **metrics))
    halves = [Evaluation(), Evaluation()]
    for place, answer in enumerate(evaluation.answers):
        halves[place % 2].add_answer(answer)
    assert evaluation.metrics["shares_letter"] == pytest.approx(2 / 3)
    assert evaluation.metrics["rouge_l"] == pytest.approx((1 + 0 + 2 * 2 / 6) / 3)
    assert Evaluation.merge(halves).metrics == pytest.approx(evaluation.metrics)
    assert [answer.metrics["shares_letter"] for answer in evaluation.answers] == [0, 1, 1]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nowhere:f", "evaluation.metrics: module 'nowhere' cannot be imported"),
        ("own_metrics:missing", "evaluation.metrics: module 'own_metrics' has no function 'missing'"),
        ("own_metrics:number", "evaluation.metrics: 'own_metrics:number' is not a function but a int"),
        ("own_metrics:text", "'own_metrics:text' returns 'good' for rows.jsonl, line 1; return a finite number"),
        ("own_metrics:nan", "'own_metrics:nan' returns nan for rows.jsonl, line 1; return a finite number"),
        (
            "own_metrics:fails",
            r"'own_metrics:fails' fails for rows.jsonl, line 1: KeyError: 'x' .own_metrics.py",
        ),
        ("own_metrics:accuracy", "evaluation.metrics: two metrics are named 'accuracy'; rename the function"),
    ],
)
def test_unusable_metrics_are_errors_in_one_sentence(path, said, monkeypatch, tmp_path):
    (tmp_path / "own_metrics.py").write_text(
        "number = 3\n"
        "def text(completion, row): return 'good'\n"
        "def nan(completion, row): return float('nan')\n"
        "def fails(completion, row): return row['x']\n"
        "def accuracy(completion, row): return 1.0\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_metrics", raising=False)
    with pytest.raises(InputError, match=said):
        score("4", metrics=[path], generation=GENERATION)


def test_metrics_require_generated_answers():
    with pytest.raises(ValueError, match="set 'generation' too"):
        EvaluationConfig(metrics=["rouge_l"])
