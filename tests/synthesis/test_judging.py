"""A model rates rows; low ratings and missing ones are rejected, each with its own reason."""

import re

import pyarrow.parquet as pq
import pytest

from rayk.config import JudgeFilterConfig, ResponsesConfig, parse_config
from rayk.errors import InputError
from rayk.run import distill, synthesize
from rayk.synthesis import RecipeContext, synthesize_rows
from rayk.synthesis.base import Candidate
from rayk.synthesis.judging import Judge, find_judges
from rayk.synthesis.rows import filter_fields
from rayk.synthesis.store import StoredCompletion
from rayk.text import build_filters
from tests.engines.endpoint import Reply, completion, prompt_of
from tests.runs import settings
from tests.synthesis.helpers import prompts_of

SHORT = "{prompt} -> {completion}?"


def judge(**changed):
    return {"kind": "judge", "template": SHORT, **changed}


def run_recipe(teacher, store, prompts, *filters, judges=None, **changed):
    given = ResponsesConfig(filters=list(filters), **changed)
    return synthesize_rows(
        given, prompts, teacher, store, build_filters(given.filters), context=RecipeContext(judges=judges or {})
    )


def rows(store, name="rows"):
    return pq.read_table(store.folder / f"{name}.parquet").to_pylist()


def rating(replies):
    """Respond to "a" with "A", and to "a -> A?" with the rating of "a" in `replies`."""

    def answer(body):
        prompt = prompt_of(body)
        rated = prompt.endswith("?")
        return completion(body, replies[prompt.split(" ->")[0]] if rated else prompt.upper())

    return answer


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Good.\nScore: 4", 4.0), ("**Score:** 4.5", 4.5), ("score - 3", 3.0), ("Score: 2. No: Score: 5", 5.0),
        ("Four of five", None), ("", None), ("Score: five", None), ("Score", None),
    ],
)  # fmt: skip
def test_the_last_score_of_a_reply_counts(reply, score):
    assert Judge("judge", JudgeFilterConfig()).score(reply) == score
    if score is not None:
        assert Judge("judge", JudgeFilterConfig(score_pattern=r"(\d+)")).score(reply) in (score, 5.0)


def test_a_score_must_be_a_number():
    assert Judge("judge", JudgeFilterConfig(score_pattern="(good|bad)")).score("It is good.") is None


def test_the_template_accepts_braces_in_a_row():
    asked = Judge("judge", JudgeFilterConfig(template="{{{prompt}}} {completion}")).prompt(
        {"prompt": "{x} {0}", "completion": "%s", "more": 1}
    )
    assert asked == "{{x} {0}} %s"
    with pytest.raises(InputError, match="Filter 'judge' reads the field 'chosen', which the row lacks"):
        Judge("judge", JudgeFilterConfig(template="{chosen}")).prompt({"prompt": "?"})


def test_the_template_can_contain_both_completions_of_a_pair():
    written = StoredCompletion("key", "A", 1, None, "stop")
    pair = Candidate("a", "better", 0, (written, written), worse="worse")
    template = "{prompt}: {chosen} or {rejected}? {completion}"
    row = filter_fields(pair, prompts_of("a"))
    assert Judge("judge", JudgeFilterConfig(template=template)).prompt(row) == "a: better or worse? better"


def test_several_judges_are_numbered():
    names = [each.name for each in find_judges([JudgeFilterConfig(), *ResponsesConfig().filters, JudgeFilterConfig()])]
    assert names == ["judge 1", "judge 2"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"template": "Good?"}, "names no field; name fields of the row in it, such as {prompt}"),
        ({"template": "{prompt.x}"}, "has {prompt.x}; name fields of the row"),
        ({"template": "{prompt"}, "is not a template"),
        ({"score_pattern": r"\d"}, "needs exactly one group"),
        ({"teacher": "apy"}, "synthesis.filters: judge's teacher 'apy' is none of the teachers (parrot)"),
    ],
)  # fmt: skip
def test_one_sentence_says_why_a_judge_cannot_be_used(tmp_path, tiny_student, changed, said):
    values = settings(tmp_path, tiny_student)
    values |= {"teachers": [{"name": "parrot", "attach": True}]}
    with pytest.raises(InputError) as caught:
        parse_config(values | {"synthesis": {"kind": "responses", "filters": [judge(**changed)]}})
    assert said in str(caught.value)


@pytest.mark.cluster
def test_rows_are_kept_by_their_rating_and_rated_once(chat_teacher, endpoint, store):
    replies = {"a": "Score: 5", "b": "Bad. Score: 2", "c": "I would not say.", "d": "Score: 4", "e": "no", "f": "no"}
    endpoint.answer = rating(replies)
    endpoint.replies["e -> E?"] = [Reply(400, b'{"error": {"message": "too rude"}}')]
    prompts = prompts_of(*"abcdef")
    short = {"kind": "keywords", "keywords": ["f"]}
    summary = run_recipe(chat_teacher, store, prompts, judge(), short)
    kept, rejected = rows(store), rows(store, "rejected")
    assert [(row["prompt"], row["completion"], row["judge_score"]) for row in kept] == [("a", "A", 5), ("d", "D", 4)]
    assert {row["prompt"]: (row["rejected_by"], row["reason"]) for row in rejected} == {
        "b": ("judge", "is rated 2, below 4"),
        "c": ("judge unparsable", "no score in 'I would not say.'"),
        "e": ("judge refused", "400: too rude"),
        "f": ("keywords", "contains 'f'"),
    }
    assert summary["rejected"] == {"keywords": 1, "judge": 1, "judge unparsable": 1, "judge refused": 1}
    assert (summary["refused"], summary["unanswered"]) == (1, 0)
    assert [store.find(key).text for key in kept[0]["keys"]] == ["A", "Score: 5"]
    asked = [each for each in endpoint.requests if each.prompt == "a -> A?"]
    assert (asked[0].body["temperature"], asked[0].body["max_tokens"]) == (0.0, 512)
    before = len(endpoint.requests)
    assert before == 6 + 5
    endpoint.answer = rating(replies | {"e": "Score: 4"})
    run_recipe(chat_teacher, store, prompts, judge(at_least=2), short)
    assert [row["prompt"] for row in rows(store)] == ["a", "b", "d"]
    assert len(endpoint.requests) == before


@pytest.mark.cluster
def test_equal_prompts_are_judged_once_and_rejected_rows_are_no_duplicates(chat_teacher, endpoint, store):
    endpoint.answer = rating({"the same words": "Score: 1", "the same  words": "Score: 5"})
    near = {"kind": "near_duplicates", "fields": ["prompt"]}
    summary = run_recipe(chat_teacher, store, prompts_of("the same words", "the same  words"), near, judge())
    assert [row["prompt"] for row in rows(store)] == ["the same  words"]
    assert summary["rejected"] == {"judge": 1, "near_duplicates": 0}
    endpoint.answer = rating({"x": "Score: 5"})
    asked = len(endpoint.requests)
    run_recipe(chat_teacher, store, prompts_of("x", "x", "x"), judge(template="{prompt} ->?"))
    assert len(endpoint.requests) == asked + 3 + 1


@pytest.mark.cluster
def test_another_model_judges_and_is_distinguished_in_the_provenance(
    served, chat_teacher, plain_teacher, endpoint, store, tmp_path, tiny_student
):
    endpoint.answer = rating({"a": "Score: 5"})
    run_recipe(chat_teacher, store, prompts_of("a"), judge(teacher="scribbler"), judges={"scribbler": plain_teacher})
    assert [(each.path, each.prompt) for each in endpoint.requests] == [
        ("/v1/chat/completions", "a"), ("/v1/completions", "a -> A?"),
    ]  # fmt: skip
    parts = (store.folder / "completions").glob("*.parquet")
    provenance = [row for part in parts for row in pq.read_table(part).to_pylist()]
    assert {(row["prompt"], row["teacher"], row["model"]) for row in provenance} == {
        ("a", "parrot", "parrot-1"), ("a -> A?", "judge", "scribbler-1"),
    }  # fmt: skip
    # In a run: the endpoint generates, and the tiny teacher judges in its chat template, without a number.
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n')
    values = settings(tmp_path, tiny_student)
    filters = [judge(teacher="served", max_new_tokens=4, score_pattern="()", at_least=0)]
    values |= {
        "teachers": [{"name": "parrot", "attach": True}, {"name": "served", "attach": True}],
        "data": {"train": {"path": str(path)}}, "synthesis": {"kind": "responses", "filters": filters},
    }  # fmt: skip
    config = parse_config(values)
    assert (config.synthesis_teachers, config.synthesis_only_teachers) == (["parrot", "served"], ["parrot", "served"])
    with pytest.raises(Exception, match="All 1 candidate rows were rejected .1 judge unparsable"):
        synthesize(config)


@pytest.mark.cluster
def test_a_run_trains_on_rows_that_its_judge_accepts(tmp_path, tiny_student, served, chat_teacher, endpoint):
    """A served model generates, an endpoint judges."""
    endpoint.answer = lambda body: completion(body, f"Score: {5 if prompt_of(body)[0] in 'aceg' else 2}")
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"prompt": "{letter}"}}\n' for letter in "abcdefgh"))
    values = settings(tmp_path, tiny_student, steps=2) | {
        "teachers": [{"name": "served", "attach": True}, {"name": "parrot", "attach": True}],
        "data": {"train": {"path": str(path)}},
        "synthesis": {
            "kind": "responses", "sampling": {"max_new_tokens": 8}, "filters": [judge(teacher="parrot")],
        },
    }  # fmt: skip
    result = distill(parse_config(values))
    kept = pq.read_table(result.output / "synthesis" / "rows.parquet").to_pylist()
    assert [(row["prompt"], row["judge_score"]) for row in kept] == [(letter, 5) for letter in "aceg"]
    assert result.summary["rows"]["train"] == 4
    assert sorted(each.prompt[0] for each in endpoint.requests) == list("abcdefgh")
    assert "b ✗ judge: is rated 2, below 4" in " ".join(
        re.sub(r"<[^>]*>", " ", (result.output / "report.html").read_text()).split()
    )
