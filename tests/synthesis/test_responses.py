"""A teacher's completions become rows: all of them, or the best of several."""

import pyarrow.parquet as pq
import pytest

from rayk.config import ResponsesConfig
from rayk.errors import InputError, RunFailed
from rayk.synthesis import CompletionStore, synthesize_rows
from rayk.synthesis.prompts import Prompt
from rayk.synthesis.responses import Responses
from rayk.text import build_filters
from tests.engines.endpoint import Reply, completion
from tests.synthesis.helpers import prompts_of

pytestmark = pytest.mark.cluster


def run_recipe(teacher, store, prompts, seed=0, **settings):
    settings = ResponsesConfig(**settings)
    return synthesize_rows(settings, prompts, teacher, store, build_filters(settings.filters), seed=seed)


def rows(store, name="rows"):
    return pq.read_table(store.folder / f"{name}.parquet").to_pylist()


def test_completions_become_rows_with_the_fields_of_the_source(chat_teacher, endpoint, store):
    prompts = prompts_of("a", "b", domain="letters")
    summary = run_recipe(chat_teacher, store, prompts)
    assert (summary["kept"], summary["candidates"], summary["unanswered"]) == (2, 2, 0)
    assert summary["teacher"] == {"name": "parrot", "model": "parrot-1", "engine": "openai"}
    assert summary["usage"]["requests"] == 2
    assert store.summary == summary
    first, second = rows(store)
    assert (first["prompt"], first["completion"], first["domain"]) == ("a", "[a]", "letters")
    assert (second["where"], second["finish_reason"]) == ("rows.jsonl, line 2", "stop")
    assert store.find(first["keys"][0]).text == "[a]"


def test_equal_seeds_give_equal_rows_and_another_seed_others(served, tmp_path):
    written = []
    for name, seed, in_flight in (("one", 3, 64), ("two", 3, 2), ("other", 4, 64)):
        with CompletionStore(tmp_path / name) as store:
            store.claim({}, set(), set())
            settings = {"samples": 2, "sampling": {"max_new_tokens": 8, "temperature": 1.0}, "filters": []}
            run_recipe(
                served, store, prompts_of("the cat", "Question:", "what is"), seed, in_flight=in_flight, **settings
            )
            written.append(rows(store))
    assert written[0] == written[1]
    assert len({row["completion"] for row in written[0]}) == 6
    assert [row["completion"] for row in written[0]] != [row["completion"] for row in written[2]]
    assert not {key for row in written[0] for key in row["keys"]} & {key for row in written[2] for key in row["keys"]}


def test_the_best_sample_has_the_highest_mean_logprob(served, store):
    summary = run_recipe(
        served, store, prompts_of("the cat", "the dog"), samples=4, keep="best", filters=[],
        sampling={"max_new_tokens": 8, "temperature": 1.0},
    )  # fmt: skip
    assert (summary["kept"], summary["rejected"]) == (2, {"not_best": 6})
    kept, rejected = rows(store), rows(store, "rejected")
    for row in kept:
        others = [each["mean_logprob"] for each in rejected if each["prompt"] == row["prompt"]]
        assert len(others) == 3
        assert row["mean_logprob"] == row["score"] >= max(others)


def test_the_best_sample_is_a_right_one_or_none_is_kept(chat_teacher, endpoint, store):
    prompts = [Prompt(f"{i} + {i}", f"line {i}", {}, str(2 * i)) for i in range(1, 4)]
    right = {"1 + 1": "It makes 2.", "2 + 2": "so 5, no: the answer is 4.0", "3 + 3": "It makes 7."}
    endpoint.answer = lambda body: completion(body, right[body["messages"][0]["content"]])
    settings = {"keep": "best", "scorer": "answer", "answer": {"type": "number"}}
    summary = run_recipe(chat_teacher, store, prompts, samples=2, **settings)
    assert (summary["kept"], summary["rejected"]) == (2, {"truncated": 0, "wrong_answer": 2, "duplicate": 2})
    assert [row["completion"] for row in rows(store)] == [right["1 + 1"], right["2 + 2"]]
    assert {row["reason"] for row in rows(store, "rejected") if row["rejected_by"] == "wrong_answer"} == {
        "does not end in 6"
    }


def test_a_users_function_selects_the_best_sample(chat_teacher, endpoint, store, tmp_path, monkeypatch):
    (tmp_path / "tastes.py").write_text(
        "def short(prompt, completion, row):\n    return -len(completion) * row['weight']"
    )
    monkeypatch.chdir(tmp_path)
    lengths = iter([9, 3, 6])
    endpoint.answer = lambda body: completion(body, "x" * next(lengths))
    summary = run_recipe(
        chat_teacher, store, prompts_of("a", weight=2), samples=3, keep="best", scorer="tastes:short", in_flight=1
    )  # fmt: skip
    assert summary["rejected"]["not_best"] == 2
    assert [(row["completion"], row["score"]) for row in rows(store)] == [("xxx", -6.0)]
    with pytest.raises(InputError, match=r"synthesis.scorer: module 'tastes' has no function 'long'"):
        Responses.check(ResponsesConfig(keep="best", scorer="tastes:long"), chat_teacher.settings)


def test_filters_come_before_the_selection_and_give_reasons(chat_teacher, endpoint, store):
    """The best of the accepted samples is kept, also if a rejected one scores higher."""
    texts = {"a": ["no no no no no no no no no no", "yes, of course it is so"], "b": ["fine then, have it so"]}

    def answer(body):
        mine = texts[body["messages"][0]["content"]]
        return completion(body, mine.pop(0) if len(mine) > 1 else mine[0])

    endpoint.answer = answer
    prompts = [Prompt("a", "line 1", {}, None), Prompt("b", "line 2", {}, None)]
    filters = [{"kind": "repetition"}, {"kind": "length", "maximum": 50}]
    summary = run_recipe(chat_teacher, store, prompts, samples=2, filters=filters, in_flight=1)
    assert summary["rejected"] == {"repetition": 1, "length": 0, "duplicate": 1}
    assert [row["completion"] for row in rows(store)] == [texts["a"][-1], texts["b"][-1]]
    examples = summary["examples"]["rejected"]
    assert {(each["rejected_by"], each["reason"]) for each in examples} == {
        ("repetition", "repeats 86% of its 4-grams"),
        ("duplicate", "an earlier row has the same prompt and completion"),
    }


def test_empty_truncated_and_missing_completions_are_rejected_with_the_reason(chat_teacher, endpoint, store):
    endpoint.replies["refused"] = [Reply(400, b'{"error": {"message": "too rude"}}')]
    kinds = {"empty": {"generated": " \n"}, "cut": {"finish_reason": "length"}}
    endpoint.answer = lambda body: completion(body, **kinds.get(body["messages"][0]["content"], {}))
    summary = run_recipe(chat_teacher, store, prompts_of("refused", "empty", "cut", "good"))
    assert summary["rejected"] == {"truncated": 1, "refused": 1, "empty": 1}
    assert (summary["refused"], summary["unanswered"]) == (1, 0)
    assert [row["prompt"] for row in rows(store)] == ["good"]
    assert {row["prompt"]: row["reason"] for row in rows(store, "rejected")} == {
        "refused": "400: too rude", "empty": "the teacher generated no text", "cut": "was truncated at the token limit",
    }  # fmt: skip


def test_a_run_without_rows_fails_with_the_reasons(chat_teacher, endpoint, store):
    endpoint.answer = lambda body: completion(body, "")
    with pytest.raises(RunFailed, match="^All 2 candidate rows were rejected .2 empty, the first: the teacher"):
        run_recipe(chat_teacher, store, prompts_of("a", "b"))
    assert store.summary is None
    assert len(rows(store, "rejected")) == 2


def test_stop_texts_are_removed(chat_teacher, endpoint, store):
    endpoint.answer = lambda body: completion(body, "four \nQ: and")  # some endpoints keep the stop text
    run_recipe(chat_teacher, store, prompts_of("a"), sampling={"stop": ["\nQ:"]})
    assert [row["completion"] for row in rows(store)] == ["four"]
    assert endpoint.requests[0].body["stop"] == ["\nQ:"]


def test_unselected_samples_make_no_duplicates(chat_teacher, endpoint, store, tmp_path, monkeypatch):
    (tmp_path / "likes.py").write_text("def short(prompt, completion, row):\n    return -len(completion)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    long = "one two three four five six seven eight nine ten"
    answers = iter(["one", f"{long} x", f"{long} y", f"{long} y"])
    endpoint.answer = lambda body: completion(body, next(answers))
    filters = [{"kind": "near_duplicates", "fields": ["completion"], "threshold": 0.7}]
    summary = run_recipe(
        chat_teacher,
        store,
        prompts_of("a", "b"),
        samples=2,
        keep="best",
        scorer="likes:short",
        filters=filters,
        in_flight=1,
    )
    assert [row["completion"] for row in rows(store)] == ["one", f"{long} y"]
    assert summary["rejected"]["near_duplicates"] == 0


def test_a_truncated_completion_does_not_make_the_whole_one_a_duplicate(chat_teacher, endpoint, store):
    cut = iter([True, False])
    endpoint.answer = lambda body: completion(body, "four", finish_reason="length" if next(cut) else "stop")
    run_recipe(chat_teacher, store, prompts_of("2 + 2"), samples=2, in_flight=1)
    assert [row["finish_reason"] for row in rows(store)] == ["stop"]


def test_a_scorer_that_fails_is_named(chat_teacher, endpoint, store, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("def score(prompt, completion, row):\n    return row['weight']\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        InputError,
        match=r"synthesis.scorer 'broken:score' failed with KeyError: 'weight' \(broken.py, line \d\) for rows",
    ):
        run_recipe(chat_teacher, store, prompts_of("a"), samples=2, keep="best", scorer="broken:score")
