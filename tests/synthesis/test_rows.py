"""Rows keep the fields of their source, with texts, recipe fields and provenance over them."""

import pytest

from rayk.synthesis import Candidate, Prompt, StoredCompletion
from rayk.synthesis.rows import filter_fields, training_row
from rayk.synthesis.store import rows_to_table

SOURCE = {
    "question": "2 + 2?", "hint": "count", "domain": "math", "options": ["3", "4"], "answer": 4,
    "messages": [{"role": "user", "content": "2 + 2?"}], "completion": "gold", "where": "here", "tokens": 9,
}  # fmt: skip
PROMPTS = [Prompt("2 + 2?", "rows.jsonl, line 1", SOURCE)]
RESPONSE = StoredCompletion("key-1", "four", 1, -0.123456, "stop")
KEPT = ("question", "hint", "domain", "options", "answer", "messages")


def candidate(**changed):
    return Candidate("2 + 2?", "four", 0, (RESPONSE,), {"score": 1.0}, **changed)


def test_a_row_keeps_the_fields_of_its_source_except_those_it_writes_itself():
    assert training_row(candidate(), PROMPTS) == {
        **{name: SOURCE[name] for name in KEPT}, "prompt": "2 + 2?", "completion": "four", "score": 1.0,
        "where": "rows.jsonl, line 1", "finish_reason": "stop", "tokens": 1, "mean_logprob": -0.1235, "keys": ["key-1"],
    }  # fmt: skip


@pytest.mark.parametrize("changed", [{}, {"worse": "five"}, {"rejected_by": "length", "reason": "too short"}])
def test_pairs_and_rejected_rows_keep_them_too(changed):
    for row in (training_row(candidate(**changed), PROMPTS), filter_fields(candidate(**changed), PROMPTS)):
        assert {name: row[name] for name in KEPT} == {name: SOURCE[name] for name in KEPT}
    assert training_row(candidate(worse="five"), PROMPTS)["completion"] == "gold"


def test_a_generated_prompt_has_no_fields_of_another_row():
    assert not set(KEPT) & training_row(candidate(new_prompt=True), PROMPTS).keys()


def test_fields_of_several_types_are_read_back_as_text():
    rows = [{"domain": domain} for domain in ("math", 7, None, "law", True)]
    assert [row["domain"] for row in rows_to_table(rows).to_pylist()] == ["math", "7", None, "law", "true"]
