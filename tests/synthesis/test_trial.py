"""A user's functions are called once before a teacher generates anything, and one sentence says what is wrong."""

import sys

import pytest
from pydantic import TypeAdapter

from rayk.config import SynthesisConfig
from rayk.errors import InputError
from rayk.synthesis import RECIPES, try_functions
from rayk.synthesis.trial import example_fields
from tests.synthesis.helpers import prompts_of

FUNCTIONS = """
def length(prompt, completion, row):
    return len(completion) * row["weight"]

def text(prompt, completion, row):
    return "good"

def two(prompt, completion):
    return 1

def short(candidate):
    return "too long" if len(candidate["completion"]) > 10 else None

def rationale(candidate):
    return None if candidate["rationale"] else "has no rationale"

def absent(candidate):
    return candidate["no_such_field"]

def wrong(candidate):
    return False
"""


@pytest.fixture(autouse=True)
def functions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    yield
    sys.modules.pop("mine", None)


def settings_of(kind="responses", filters=(), **changed):
    custom = [{"kind": "custom", "function": f"mine:{name}"} for name in filters]
    values = {"kind": kind, "filters": [{"kind": "truncated"}, *custom], **changed}
    return TypeAdapter(SynthesisConfig).validate_python(values)


def results(settings):
    return list(try_functions(settings, prompts_of("a", "b", weight=2)))


def test_scorers_and_filters_that_work_are_reported():
    settings = settings_of(keep="best", scorer="mine:length", filters=["short"])
    assert results(settings) == [
        "synthesis.scorer mine:length returns 70 for an example", "synthesis.filters mine:short rejects an example",
    ]  # fmt: skip
    assert results(settings_of()) == []


def test_filters_may_read_the_fields_of_the_recipe():
    assert results(settings_of("chain_of_thought", ["rationale"], keep="answered")) == [
        "synthesis.filters mine:rationale accepts an example"
    ]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"scorer": "mine:text"},
            "synthesis.scorer 'mine:text' returned 'good' for rows.jsonl, line 1; let it return",
        ),
        ({"scorer": "mine:two"}, r"synthesis.scorer 'mine:two' failed with TypeError: two\(\) takes 2 positional"),
        ({"scorer": "mine:none"}, "synthesis.scorer: module 'mine' has no function 'none'"),
        ({"filters": ["absent"]}, r"mine:absent failed with KeyError: 'no_such_field' \(mine.py, line \d+\); the cand"),
        ({"filters": ["wrong"]}, "mine:wrong returned False; let it return None to accept a candidate, or the reason"),
    ],
)
def test_one_sentence_says_what_is_wrong_with_a_function(changed, message):
    with pytest.raises(InputError, match=message):
        results(settings_of(**changed))


@pytest.mark.parametrize("kind", RECIPES)
def test_every_recipe_has_an_example_row(kind):
    row = example_fields(settings_of(kind), prompts_of("a", weight=2))
    assert {"prompt", "completion", "finish_reason", "tokens", "weight"} <= row.keys()
    assert {"chosen", "rejected"} <= row.keys() if kind == "preferences" else "chosen" not in row
