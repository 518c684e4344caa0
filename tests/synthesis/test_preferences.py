"""Pairs of a better and a worse completion: which is chosen, and which pairs are rejected."""

import pyarrow.parquet as pq
import pytest

from rayk.config import EmptyFilterConfig, PreferencesConfig, TruncatedFilterConfig
from rayk.errors import RunFailed
from rayk.synthesis import RecipeContext, synthesize_rows
from rayk.text import build_filters
from tests.engines.endpoint import completion, prompt_of
from tests.synthesis.helpers import prompts_of

pytestmark = pytest.mark.cluster

STUDENT = {"student_sampling": {"max_new_tokens": 32, "temperature": 0.3}}


def run_recipe(chat_teacher, endpoint, store, prompts, teacher, student, filters=(), **settings):
    """Make pairs of the completions of `teacher` and `student`; return summary, pairs and rejected pairs."""
    left = [{prompt: list(texts) for prompt, texts in said.items()} for said in (teacher, student)]

    def answer(body):
        return completion(body, left[body["temperature"] == 0.3][prompt_of(body)].pop(0))

    endpoint.answer = answer
    config = PreferencesConfig(**STUDENT, in_flight=1, **settings)
    summary = synthesize_rows(
        config, prompts, chat_teacher, store, build_filters(filters), context=RecipeContext(student=chat_teacher)
    )  # fmt: skip
    return summary, *(pq.read_table(store.folder / f"{name}.parquet").to_pylist() for name in ("rows", "rejected"))


def figure(summary, name):
    return next(each["value"] for each in summary["figures"] if each["name"] == name)


def test_the_teachers_completion_is_preferred_to_the_students(chat_teacher, endpoint, store):
    prompts = prompts_of("a", "b", "c", completion="gold")
    teacher, student = {"a": ["long answer"], "b": ["same"], "c": ["yes"]}, {"a": ["short"], "b": [" same"], "c": [""]}
    summary, rows, rejected = run_recipe(chat_teacher, endpoint, store, prompts, teacher, student)
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in rows] == [("a", "long answer", "short")]
    assert (rows[0]["chosen_from"], rows[0]["rejected_from"], rows[0]["completion"]) == ("teacher", "student", "gold")
    assert len(set(rows[0]["keys"])) == 2
    assert {row["prompt"]: (row["rejected_by"], row["reason"]) for row in rejected} == {
        "b": ("identical", "both completions are the same"), "c": ("empty", "the student generated no text"),
    }  # fmt: skip
    assert summary["rejected"] == {"identical": 1, "empty": 1}
    assert figure(summary, "chosen answer, characters") == len("long answer")
    assert figure(summary, "rejected answer, characters") == len("short")
    assert figure(summary, "pairs whose chosen answer is the longer one") == 1
    assert summary["examples"]["kept"][0]["worse"] == "short"
    kept = pq.read_table(store.folder / "completions").to_pylist()
    assert sorted((row["prompt"], row["teacher"]) for row in kept) == sorted(
        (prompt, who) for prompt in "abc" for who in ("parrot", "student")
    )


def test_the_smaller_number_of_samples_is_repeated(chat_teacher, endpoint, store):
    _, rows, _ = run_recipe(
        chat_teacher, endpoint, store, prompts_of("a"), {"a": ["yes"]}, {"a": ["no", "never", "no"]}, student_samples=3
    )
    assert sorted((row["chosen"], row["rejected"]) for row in rows) == [
        ("yes", "never"),
        ("yes", "no"),
    ]  # one pair is repeated


def test_best_and_worst_of_all_samples_and_no_pair_of_equal_scores(chat_teacher, endpoint, store):
    prompts = [*prompts_of("a", "b", "c", answer="4")]
    prompts = [type(each)(each.text, each.where, each.fields, "4") for each in prompts]
    teacher = {"a": ["it is 4"], "b": ["it is 4"], "c": ["4"]}
    student = {"a": ["it is 3", "so it is 4"], "b": ["no 3", "no 5"], "c": ["4", "4!"]}
    summary, rows, rejected = run_recipe(
        chat_teacher, endpoint, store, prompts, teacher, student, chosen="best", student_samples=2,
        answer={"type": "number"},
    )  # fmt: skip
    assert [(row["chosen"], row["rejected"], row["chosen_from"]) for row in rows] == [
        ("so it is 4", "it is 3", "student"), ("it is 4", "no 3", "teacher"),
    ]  # fmt: skip
    assert [(row["chosen_score"], row["rejected_score"]) for row in rows] == [(1, 0)] * 2
    assert [(row["rejected_by"], row["reason"]) for row in rejected] == [("tie", "all 3 completions score 1")]
    assert figure(summary, "chosen answers by the teacher") == 0.5
    assert figure(summary, "teacher's right answers") == 1
    assert figure(summary, "student's right answers") == 0.5


def test_filters_read_the_chosen_completion_or_by_name_the_rejected_one(chat_teacher, endpoint, store):
    filters = [TruncatedFilterConfig(), EmptyFilterConfig(field="rejected"), EmptyFilterConfig()]
    summary, rows, _ = run_recipe(chat_teacher, endpoint, store, prompts_of("a"), {"a": ["x"]}, {"a": ["y"]}, filters)
    assert summary["rejected"] == {"truncated": 0, "empty 1": 0, "empty 2": 0}
    assert len(rows) == 1


def test_only_equal_completions_give_no_training_data(chat_teacher, endpoint, store):
    with pytest.raises(RunFailed, match="1 identical, the first: both completions are the same"):
        run_recipe(chat_teacher, endpoint, store, prompts_of("a"), {"a": ["x"]}, {"a": ["x"]})
