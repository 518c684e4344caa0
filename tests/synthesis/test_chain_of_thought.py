"""Rationales with right answers become rows in the student's format."""

import pyarrow.parquet as pq
import pytest

from rayk.config import ChainOfThoughtConfig
from rayk.synthesis import synthesize_rows
from rayk.synthesis.prompts import Prompt
from rayk.text import build_filters
from tests.engines.endpoint import Reply, completion

pytestmark = pytest.mark.cluster

GSM8K = {"answer": {"type": "number", "pattern": "#### (.+)"}}


def questions(*truths):
    return [
        Prompt(f"What is {i}?", f"line {i}", {"answer": f"… #### {truth}"}, truth)
        for i, truth in enumerate(truths, start=1)
    ]


def run_recipe(teacher, store, prompts, **settings):
    settings = ChainOfThoughtConfig(**GSM8K | settings)
    return synthesize_rows(settings, prompts, teacher, store, build_filters(settings.filters))


def rows(store, name="rows"):
    return pq.read_table(store.folder / f"{name}.parquet").to_pylist()


def thinking(rationales, answers):
    """Respond to a question with its rationale, and to a rationale with its answer."""

    def answer(body):
        prompt = body["messages"][0]["content"]
        if prompt.endswith("Therefore, the answer is"):
            return completion(body, next(text for part, text in answers.items() if part in prompt))
        mine = rationales[prompt.removeprefix("Q: ").split("\n")[0]]
        return completion(body, mine.pop(0) if isinstance(mine, list) else mine)

    return answer


def test_two_requests_give_a_rationale_and_its_answer(chat_teacher, endpoint, store):
    endpoint.answer = thinking({"What is 1?": " Two and two. \n"}, {"Two": " 1,004 apples. 7"})
    summary = run_recipe(chat_teacher, store, questions("1004"))
    first, second = endpoint.requests
    assert first.prompt == "Q: What is 1?\nA: Let's think step by step."
    assert second.prompt == f"{first.prompt} Two and two.\nTherefore, the answer is"
    assert (first.body["temperature"], first.body["max_tokens"]) == (0.7, 128)
    assert (second.body["temperature"], second.body["max_tokens"]) == (0.0, 32)
    (row,) = rows(store)
    assert (row["prompt"], row["completion"]) == ("What is 1? ###", " Two and two. --> 1004")
    assert (row["rationale"], row["teacher_answer"], row["correct"]) == ("Two and two.", "1004", True)
    assert [store.find(key).text for key in row["keys"]] == [" Two and two. \n", " 1,004 apples. 7"]
    assert summary["figures"][0] == {"name": "teacher's accuracy", "value": 1.0, "share": True}


def test_a_right_answer_is_trained_on_in_the_notation_of_the_row(chat_teacher, endpoint, store):
    endpoint.answer = thinking({"What is 1?": "So."}, {"So": " $1004.00"})
    run_recipe(chat_teacher, store, questions("1,004"), student_format="plain")
    (row,) = rows(store)
    assert (row["prompt"], row["completion"]) == ("What is 1?", "So.\nTherefore, the answer is 1,004.")


def test_only_right_rationales_are_kept_and_the_others_have_a_reason(chat_teacher, endpoint, store):
    endpoint.answer = thinking(
        {
            "What is 1?": ["Right.", "Wrong.", "Right."],
            "What is 2?": ["Mute.", "Wrong.", "Cut."],
            "What is 3?": "Late.",
        },
        {"Right": "The answer is 4", "Wrong": "5", "Mute": "that I cannot say", "Cut": "4"},
    )
    endpoint.replies["Q: What is 3?\nA: Let's think step by step."] = [Reply(400, b'{"error": {"message": "no"}}')] * 3
    summary = run_recipe(chat_teacher, store, questions("4", "4", "4"), rationales=3, in_flight=1)
    assert summary["rejected"] == {
        "truncated": 0, "wrong_answer": 2, "duplicate": 1, "no_answer": 1, "refused": 3,
    }  # fmt: skip
    assert {row["reason"] for row in rows(store, "rejected") if row["rejected_by"] != "duplicate"} == {
        "5 instead of 4", "no number in 'that I cannot say'", "400: no",
    }  # fmt: skip
    assert [row["completion"] for row in rows(store)] == [" Right. --> 4", " Cut. --> 4"]
    figures = {each["name"]: each["value"] for each in summary["figures"]}
    assert figures == {
        "teacher's accuracy": 3 / 6, "rationales kept": 2 / 6, "questions with a rationale": 2 / 3,
        "different rationales a question": 1.0,
    }  # fmt: skip


def test_without_right_answers_every_answer_is_kept(chat_teacher, endpoint, store):
    endpoint.answer = thinking({"What is 1?": "So."}, {"So": " (b), I think"})
    prompts = [Prompt("What is 1?", "line 1", {}, None)]
    summary = run_recipe(chat_teacher, store, prompts, keep="answered", answer={"type": "choice"})
    assert rows(store)[0]["completion"] == " So. --> B"
    assert "teacher's accuracy" not in {each["name"] for each in summary["figures"]}


def test_no_answer_is_requested_for_an_empty_rationale(chat_teacher, endpoint, store):
    endpoint.answer = thinking({"What is 1?": " ", "What is 2?": "So."}, {"So": "4"})
    summary = run_recipe(chat_teacher, store, questions("4", "4"))
    assert summary["rejected"]["empty"] == 1
    assert len(endpoint.requests) == 3


def test_a_second_run_sends_no_requests(chat_teacher, endpoint, store):
    rationales = {f"What is {i}?": f"Way {i}." for i in range(1, 9)}
    endpoint.answer = thinking(rationales, {"Way": "4"})
    run_recipe(chat_teacher, store, questions(*"4" * 8), rationales=2)
    before, asked = rows(store), len(endpoint.requests)
    run_recipe(chat_teacher, store, questions(*"4" * 8), rationales=2)
    assert (rows(store), len(endpoint.requests)) == (before, asked)
