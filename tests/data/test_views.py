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
    assert views.has_view("hinted") and not views.has_view("plain")


def test_context_of_one_teacher_precedes_that_of_every_teacher(tokenizer):
    (row,) = make_rows(tokenizer, ROW)
    own, shared = np.arange(3, dtype=np.int32), np.arange(5, dtype=np.int32)
    viewed = replace(row, contexts={"one": own, EVERY_TEACHER: shared})
    assert np.array_equal(viewed.view("one").prompt_ids, own)
    assert np.array_equal(viewed.view("two").prompt_ids, shared)
    assert np.array_equal(viewed.view("two").targets, row.targets)


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
