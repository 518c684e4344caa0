"""Rows keep the fields of their source, with texts, recipe fields and provenance over them."""

from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from rayk.config import DataSource
from rayk.data.row_texts import RowTexts
from rayk.data.sources import read_rows
from rayk.synthesis import Candidate, Prompt, StoredCompletion
from rayk.synthesis.prompts import transcript
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


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add"}}]}


def chat_prompt(*messages, **fields):
    fields = {"messages": [*messages, {"role": "assistant", "content": "gold"}], "domain": "math"} | fields
    return Prompt(transcript(messages), "rows.jsonl, line 1", fields, None, tuple(messages))


def test_rows_of_messages_stay_messages():
    prompt = chat_prompt(*CHAT)
    one = Candidate(prompt.text, "four", 0, (RESPONSE,))
    row = training_row(one, [prompt])
    assert row["messages"] == [*CHAT, {"role": "assistant", "content": "four"}]
    assert row["domain"] == "math"
    assert not {"prompt", "completion"} & row.keys()
    pair = training_row(replace(one, worse="five"), [prompt])
    assert (pair["prompt"], pair["chosen"]) == (CHAT, [{"role": "assistant", "content": "four"}])
    assert pair["rejected"] == [{"role": "assistant", "content": "five"}]
    assert not {"messages", "completion"} & pair.keys()
    fields = filter_fields(one, [prompt])
    assert (fields["prompt"], fields["completion"]) == ("System: Be brief.\n\nUser: 2 + 2?", "four")
    changed = training_row(replace(one, prompt="new", new_prompt=True), [prompt])
    assert changed["messages"][0] == {"role": "user", "content": "new"}


def test_written_conversations_are_read_back_with_their_tools(tmp_path):
    """Parquet gives all objects of a column the same keys, so schemas and calls are written as JSON."""
    calls = [CALL, {"role": "tool", "content": "4"}]
    schemas = [{"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {}}}}}]
    prompts = [chat_prompt(CHAT[1], *calls), chat_prompt(*CHAT)]
    prompts = [replace(prompts[0], tools=schemas, fields={"tools": schemas, **prompts[0].fields}), prompts[1]]
    rows = [training_row(Candidate(each.text, "four", i, (RESPONSE,)), prompts) for i, each in enumerate(prompts)]
    path = tmp_path / "rows.parquet"
    pq.write_table(rows_to_table(rows), path)
    source = DataSource(path=str(path))
    first, second = read_rows(source)
    texts = RowTexts(source)
    assert texts.tools(first) == schemas
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    assert texts.messages(first)[1]["tool_calls"] == [call]
    assert texts.tools(second) is None
    assert texts.messages(second) == [*CHAT, {"role": "assistant", "content": "four"}]


def test_thoughts_are_kept_only_on_request():
    thinking = replace(RESPONSE, thought="Two and two.")
    one = Candidate("2 + 2?", "four", 0, (thinking, RESPONSE))
    assert training_row(one, PROMPTS)["completion"] == "four"
    kept = "<think>\nTwo and two.\n</think>\n\nfour"
    assert training_row(one, PROMPTS, keep_thoughts=True)["completion"] == kept
    pair = training_row(replace(one, worse="five"), PROMPTS, keep_thoughts=True)
    assert (pair["chosen"], pair["rejected"]) == (kept, "five")
