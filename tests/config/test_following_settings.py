"""Settings of teachers that follow the student."""

import pytest

from rayk.config import parse_config
from rayk.errors import InputError

WRONG = {
    "another model": ({"model": "m"}, {}, "leave out 'model' and 'attach'"),
    "another engine": ({"engine": {"kind": "vllm"}}, {}, "needs engine kind 'transformers'"),
    "nothing to follow": ({"follows": None, "model": "m", "ema": 0.9}, {}, "a teacher with 'follows'; set it"),
    "a student without a tokenizer": ({}, {"student": {"config": "c"}}, "set student.tokenizer"),
    "drafts to verify": ({}, {"method": {"kind": "minillm"}}, "set method.teacher_share to 0"),
    "rows to generate": (
        {}, {"synthesis": {"kind": "responses"}}, "generated before training; name another teacher in synthesis",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("teacher", "changes", "message"), WRONG.values(), ids=WRONG)
def test_settings_that_cannot_be_followed_are_named(teacher, changes, message):
    values = {
        "teachers": [{"name": "self", "follows": "student"} | teacher], "student": {"model": "m"},
        "data": {"train": {"path": "p"}}, "method": {"kind": "on_policy"},
    }  # fmt: skip
    with pytest.raises(InputError, match=message):
        parse_config(values | changes)
