"""A row's views: every reader has its own context and the same counted tokens."""

import pickle
from dataclasses import replace

import numpy as np
import pytest

from rayk.config import DataConfig, DataSource, parse_config
from rayk.data.examples import EVERY_TEACHER, Example
from rayk.data.sources import Row
from rayk.data.tokenizing import RowTokenizer
from rayk.data.views import RowViews
from rayk.errors import InputError
from rayk.rollouts.policy import with_completion


def make_rows(tokenizer, *fields, **source):
    given = DataSource(path="rows.jsonl", **source)
    lines = [Row(row, f"rows.jsonl, line {i}") for i, row in enumerate(fields, start=1)]
    return list(RowTokenizer(given, DataConfig(train=given), tokenizer).examples(lines))


@pytest.fixture
def views(tokenizer):
    """The views of a run in which teacher `hinted` reads the answer and teacher `plain` reads the student's prompt."""
    teachers = [
        {"name": "hinted", "model": "m", "prompt_template": "the {answer} is on: {prompt}"},
        {"name": "plain", "model": "m"},
    ]
    values = {
        "teachers": teachers, "student": {"model": "m"}, "data": {"train": {"path": "p"}}, "ensemble": {},
        "method": {"kind": "logit_kd"},
    }  # fmt: skip
    return RowViews.from_config(parse_config(values), tokenizer)


ROW = {"prompt": "the cat", "completion": " sat", "answer": "mat"}


def test_each_reader_has_its_context_and_the_same_counted_tokens(views, tokenizer):
    (row,) = make_rows(tokenizer, ROW)
    viewed = views.apply(row)
    assert np.array_equal(viewed.input_ids, row.input_ids)
    hinted, plain = viewed.view("hinted"), viewed.view("plain")
    assert tokenizer.decode(hinted.prompt_ids) == "the mat is on: the cat"
    assert np.array_equal(hinted.targets, row.targets) and hinted.where == row.where
    assert plain is viewed


def test_context_of_one_teacher_precedes_that_of_every_teacher(tokenizer):
    (row,) = make_rows(tokenizer, ROW)
    own, shared = np.arange(3, dtype=np.int32), np.arange(5, dtype=np.int32)
    viewed = replace(row, contexts={"one": own, EVERY_TEACHER: shared})
    assert np.array_equal(viewed.view("one").prompt_ids, own)
    assert np.array_equal(viewed.view("two").prompt_ids, shared)
    assert np.array_equal(viewed.view("two").targets, row.targets)


def test_view_that_would_replace_counted_tokens_is_refused(tokenizer):
    (row,) = make_rows(tokenizer, ROW)
    counted = row.counted.copy()
    counted[row.prompt_tokens - 1] = True
    with pytest.raises(InputError, match=r"^rows.jsonl, line 1 has counted tokens in its prompt.*of the completion"):
        replace(row, counted=counted, contexts={"one": np.arange(3, dtype=np.int32)}).view("one")


def test_prompt_in_a_template_is_the_prompt_that_the_student_reads(tokenizer):
    source = {"path": "p", "prompt_template": "Q: {question}\nA:", "completion_field": "solution"}
    config, views = chat_views(tokenizer, "{hint}{prompt}", train=source)
    rows = RowTokenizer(config.data.train, config.data, tokenizer)
    fields = {"question": "the cat", "solution": " sat", "prompt": "another field"}
    for hint in ("", "the mat. "):
        (example,) = rows.examples([Row(fields | {"hint": hint}, "rows.jsonl, line 1")])
        read = views.apply(example).view("hinted")
        assert tokenizer.decode(read.prompt_ids) == f"{hint}Q: the cat\nA:"
        assert hint or np.array_equal(read.input_ids, example.input_ids)


def test_views_are_applied_once_and_a_view_is_its_own_view(views, tokenizer):
    (row,) = make_rows(tokenizer, ROW)
    viewed = views.apply(row)
    assert views.apply(viewed) is viewed
    assert viewed.view("hinted").view("hinted").prompt_tokens == viewed.view("hinted").prompt_tokens
    again = pickle.loads(pickle.dumps(views)).apply(row)
    assert np.array_equal(again.view("hinted").input_ids, viewed.view("hinted").input_ids)


def test_rollout_keeps_the_context_of_its_row(views, tokenizer):
    (row,) = make_rows(tokenizer, ROW)
    rollout = with_completion(views.apply(row), np.array(tokenizer(" on the mat").input_ids, np.int32))
    view = rollout.view("hinted")
    assert tokenizer.decode(view.input_ids) == "the mat is on: the cat on the mat"
    assert np.array_equal(view.targets, rollout.targets)
    requested = np.zeros((rollout.counted_tokens, 2), np.int32)
    assert replace(rollout, requested=requested).view("hinted").requested is requested


def test_both_answers_of_a_pair_have_the_context(views, tokenizer):
    fields = {"prompt": "the cat", "chosen": " sat", "rejected": " swims", "answer": "mat"}
    (row,) = make_rows(tokenizer, fields, format="preference")
    for answer in views.apply(row).answers:
        assert tokenizer.decode(answer.view("hinted").prompt_ids) == "the mat is on: the cat"
        assert np.array_equal(answer.view("hinted").targets, answer.targets)


def test_row_without_a_replaceable_prompt_is_an_error(views, tokenizer):
    (text,) = make_rows(tokenizer, {"text": "the cat sat"})
    with pytest.raises(InputError, match=r"^rows.jsonl, line 1 is not a prompt with one completion.*leave it out\.$"):
        views.apply(text)
    (row,) = make_rows(tokenizer, {"prompt": "the cat", "completion": " sat"})
    with pytest.raises(InputError, match="no field 'answer'.*set teachers.prompt_template"):
        views.apply(row)
    assert isinstance(RowViews().apply(text), Example)


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho"},
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat"},
]
BEFORE = "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHo<|end|>\n"


def chat_views(tokenizer, template="the {answer} is on: {prompt}", **data):
    values = {
        "teachers": [{"name": "hinted", "model": "m", "prompt_template": template}],
        "student": {"model": "m"}, "data": {"train": {"path": "p"}} | data, "method": {"kind": "logit_kd"},
    }  # fmt: skip
    config = parse_config(values)
    return config, RowViews.from_config(config, tokenizer)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT}, {"prompt": CHAT[:4], "completion": CHAT[4:]},
        {"conversations": [{"from": each["role"], "value": each["content"]} for each in CHAT]},
        {"prompt": CHAT[:4], "chosen": CHAT[4:], "rejected": [{"role": "assistant", "content": "ran"}]},
    ],
    ids=" ".join,
)  # fmt: skip
def test_the_last_user_message_of_a_chat_is_replaced(tokenizer, row):
    config, views = chat_views(tokenizer)
    rows = RowTokenizer(config.data.train, config.data, tokenizer, pairs="chosen" in row)
    (example,) = rows.examples([Row(row | {"answer": "mat"}, "rows.jsonl, line 1")])
    viewed = views.apply(example)
    for answer in viewed.answers:
        hinted = answer.view("hinted")
        expected = BEFORE + "<|user|>\nthe mat is on: the cat<|end|>\n<|assistant|>\n"
        assert tokenizer.decode(hinted.prompt_ids) == expected
        assert np.array_equal(hinted.targets, answer.targets)


def test_prompts_that_a_template_wraps_are_replaced_inside_it(tokenizer):
    source = {"path": "p", "prompt_template": "Q: {question}", "completion_field": "solution"}
    config, views = chat_views(tokenizer, train=source, chat_template=True)
    row = {"question": "the cat", "solution": "sat", "answer": "mat"}
    (example,) = RowTokenizer(config.data.train, config.data, tokenizer).examples([Row(row, "rows.jsonl, line 1")])
    hinted = views.apply(example).view("hinted")
    assert tokenizer.decode(hinted.prompt_ids) == "<|user|>\nthe mat is on: Q: the cat<|end|>\n<|assistant|>\n"


def test_evaluation_rows_of_another_form_are_replaced_too(tokenizer):
    config, views = chat_views(tokenizer, evaluation={"path": "e", "messages_field": "turns"})
    (example,) = RowTokenizer(config.data.evaluation, config.data, tokenizer).examples(
        [Row({"turns": CHAT, "answer": "mat"}, "held_out.jsonl, line 1")]
    )
    assert "the mat is on: the cat" in tokenizer.decode(views.apply_draw(example).view("hinted").prompt_ids)


def test_a_chat_with_several_trained_turns_has_no_single_prompt(tokenizer):
    config, views = chat_views(tokenizer, train={"path": "p", "train_on": "all"})
    rows = list(
        RowTokenizer(config.data.train, config.data, tokenizer).examples(
            [Row({"messages": CHAT, "answer": "mat"}, "r")]
        )
    )
    with pytest.raises(InputError, match="is not a prompt with one completion|has 2 trained turns"):
        views.apply(rows[-1])
