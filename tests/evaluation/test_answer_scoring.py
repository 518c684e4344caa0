"""An answer is correct if the pattern finds the same text in it as in the truth; further metrics are averaged."""

import sys

import numpy as np
import pytest

from rayk.config import EvaluationConfig
from rayk.data.examples import Example
from rayk.errors import InputError
from rayk.evaluation.answer_scoring import AnswerScorer, settle_answer_type
from rayk.evaluation.evaluate import Evaluation
from tests.tiny import BOS, tiny_tokenizer

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


@pytest.mark.parametrize(
    ("kind", "text", "truth", "correct"),
    [
        ("number", "42.0", "42", True),
        ("number", "It sums to 1,000.", 1000, True),
        ("number", "$5", "5.00", True),
        ("number", "so the answer is 42, from 6 * 7", "42", True),
        ("number", "42.5", "42", False),
        ("number", "no idea", "42", False),
        ("text", "42.0", "42", False),
        ("choice", "The answer is (b).", "B", True),
        ("yes_no", "Yes, it is.", "yes", True),
        ("date", "May 3, 2021", "2021-05-03", True),
        ("free", "paris.\nIt is in France.", "Paris", True),
    ],
)
def test_answers_are_compared_by_their_type(kind, text, truth, correct):
    assert score(text, example(answer=truth), answer_field="answer", answer_type=kind).correct is correct


def test_type_is_applied_to_what_the_pattern_finds():
    settings = {"answer_pattern": "#### (.+)", "answer_type": "number"}
    assert score("3 and 9\n#### 4.0 apples, not 7", **settings).correct
    assert not score("4", **settings).correct
    said = r"answer_pattern '#### \(.\+\)' with evaluation.answer_type 'number' finds nothing in the truth ' #### four'"
    with pytest.raises(InputError, match=said):
        score("#### 4", example(completion=" #### four"), **settings)


def test_the_best_of_several_references_counts():
    settings = {"answer_field": "answers", "metrics": ["rouge_l", "exact_match", "f1"], "generation": {}}
    row = example(answers=["a dog", "the big cat", "a cat"])
    answer = score("The cat.", row, **settings)
    assert answer.metrics == {"rouge_l": pytest.approx(2 * 2 / 5), "exact_match": 1, "f1": 1}
    assert not answer.correct and score("a  cat", row, **settings).correct
    assert answer.truth == "a dog\n— or —\nthe big cat\n— or —\na cat"
    for truth in ([], None):
        with pytest.raises(InputError, match=r"^rows.jsonl, line 1"):
            score("a cat", example(answers=truth), answer_field="answers")


def test_prompt_of_a_chat_shows_where_turns_begin():
    prompt = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"},
         {"role": "user", "content": "3 + 3?"}], tokenize=False, add_generation_prompt=True,
    )  # fmt: skip
    assert score("6", example(prompt=prompt, completion="6")).prompt == prompt


def test_prompt_is_shown_without_a_bos_token_that_is_no_mark_of_a_turn():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = BOS  # as SmolLM2's <|im_start|>, which also begins each turn
    scorer = AnswerScorer(EvaluationConfig(), tokenizer)
    for prompt, shown in ((f"{BOS}2 + 2?", "2 + 2?"), (f"{BOS}user 2?{BOS}assistant", f"{BOS}user 2?{BOS}assistant")):
        assert scorer.score(example(prompt=prompt, completion=" 4"), "4", "stop", 1).prompt == shown


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


def test_several_samples_need_a_temperature():
    with pytest.raises(ValueError, match="at temperature 0 all answers are the same"):
        EvaluationConfig(generation={"samples": 5})


def test_metrics_require_generated_answers():
    with pytest.raises(ValueError, match="set 'generation' too"):
        EvaluationConfig(metrics=["rouge_l"])


LONG = " and".join(f" word {number}" for number in range(20))
"""A right answer of 59 words."""


def settle(*completions, **settings):
    rows = [example(completion=completion, note="a b") for completion in completions]
    return settle_answer_type(EvaluationConfig(**settings), rows, TOKENIZER).answer_type


@pytest.mark.parametrize(
    ("completions", "settings", "expected"),
    [
        ([" four"], {}, "text"),
        ([LONG, LONG, " four"], {}, "open"),
        ([" four", " five", " six", " seven", LONG], {}, "text"),  # on average 12.6 words
        ([LONG], {"answer_field": "note"}, "text"),
        ([LONG], {"answer_pattern": "word (.+)"}, "text"),
        ([LONG], {"answer_type": "free"}, "free"),
        ([" four"], {"answer_type": "open"}, "open"),
        ([LONG], {"keep_best": {"metric": "accuracy"}}, "text"),
        ([], {}, "text"),
    ],
)
def test_answers_are_open_if_nothing_says_what_is_right_in_long_texts(completions, settings, expected):
    assert settle(*completions, **settings) == expected


def test_open_answers_have_rouge_l_and_no_accuracy():
    evaluation = Evaluation()
    for text in ("so it is #### 4", "no"):
        evaluation.add_answer(score(text, answer_type="open", generation=GENERATION))
    assert [answer.correct for answer in evaluation.answers] == [None, None]
    assert "accuracy" not in evaluation.metrics
    assert evaluation.metrics["rouge_l"] == 0.5
    measured = EvaluationConfig(answer_type="open", generation=GENERATION).answer_metrics
    assert measured == ("answer_tokens", "stopped", "rouge_l")


def test_open_answers_have_no_pattern():
    with pytest.raises(ValueError, match="'answer_pattern' has no effect"):
        EvaluationConfig(answer_type="open", answer_pattern="(.+)")
