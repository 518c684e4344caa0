"""Rows in the shape of well-known data sets are read as the same chats, whatever form they come in."""

import contextlib
import csv
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayk.config import DataSource
from rayk.data.batches import make_batches
from rayk.data.messages import ROLES
from rayk.data.row_texts import RowTexts
from rayk.data.sources import Row, read_rows
from rayk.errors import InputError
from tests.tiny import CHAT_TEMPLATE, END, tiny_tokenizer

SYSTEM, QUESTION, ANSWER, SECOND, LAST = (
    {"role": role, "content": content}
    for role, content in (
        ("system", "be brief"), ("user", "how many?"), ("assistant", "24 clips"), ("user", "and in May?"),
        ("assistant", "72"),
    )
)  # fmt: skip
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Bern"}}}


def texts_of(**settings) -> RowTexts:
    return RowTexts(DataSource(path="rows.jsonl", **settings))


def row_of(fields) -> Row:
    return Row(fields, "rows.jsonl, line 1")


def chat_of(fields, **settings):
    texts, row = texts_of(**settings), row_of(fields)
    assert texts.format_of(row) == "messages"
    return texts.conversation(row)


def counted(tokenizer, example):
    """The decoded runs of counted tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], example.counted.astype(int), [0]))))
    return [tokenizer.decode(example.input_ids[start:end]) for start, end in edges.reshape(-1, 2)]


CHATS = {
    "UltraChat": {"prompt": "how many?", "prompt_id": "f0e3", "messages": [SYSTEM, QUESTION, ANSWER, SECOND, LAST]},
    "OpenHermes": {
        "custom_instruction": None, "source": "airoboros2.2", "system_prompt": None,
        "conversations": [
            {"from": "system", "value": "be brief", "weight": None},
            {"from": "human", "value": "how many?", "weight": None},
            {"from": "gpt", "value": "24 clips", "weight": None},
            {"from": "human", "value": "and in May?", "weight": None},
            {"from": "gpt", "value": "72", "weight": None},
        ],
    },
    "TRL prompt and completion": {"prompt": [SYSTEM, QUESTION, ANSWER, SECOND], "completion": [LAST]},
    "messages and a text": {"prompt": [SYSTEM, QUESTION, ANSWER, SECOND], "completion": "72"},
    "parts": {
        "messages": [
            message | {"content": [{"type": "text", "text": message["content"][:2]}, {"type": "text",
            "text": message["content"][2:], "image_url": None}]}
            for message in (SYSTEM, QUESTION, ANSWER, SECOND, LAST)
        ]
    },
}  # fmt: skip


@pytest.mark.parametrize("fields", CHATS.values(), ids=CHATS)
def test_all_forms_give_the_same_tokens(tokenizer, encode, fields):
    (expected,) = encode(tokenizer, [{"messages": [SYSTEM, QUESTION, ANSWER, SECOND, LAST]}])
    (example,) = encode(tokenizer, [fields])
    assert example.input_ids.tolist() == expected.input_ids.tolist()
    assert counted(tokenizer, example) == ["72" + END]
    (prompt,) = encode(tokenizer, [fields], prompts_only=True)
    assert prompt.input_ids.tolist() == expected.prompt_ids.tolist()


def test_text_before_a_completion_of_messages_is_a_users_message(tokenizer, encode):
    (expected,) = encode(tokenizer, [{"messages": [QUESTION, ANSWER]}])
    for row in ({"prompt": "how many?", "completion": [ANSWER]}, {"q": "many", "completion": [ANSWER]}):
        settings = {"prompt_template": "how {q}?"} if "q" in row else {}
        (example,) = encode(tokenizer, [row], **settings)
        assert example.input_ids.tolist() == expected.input_ids.tolist()


def test_row_with_a_conversational_prompt_only(tokenizer, encode):
    (prompt,) = encode(tokenizer, [{"prompt": [SYSTEM, QUESTION]}], prompts_only=True)
    rendered = tokenizer.apply_chat_template([SYSTEM, QUESTION], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(prompt.input_ids) == rendered
    assert texts_of().prompt_messages(row_of({"prompt": [SYSTEM, QUESTION]})) == [SYSTEM, QUESTION]
    assert texts_of().prompt_messages(row_of({"prompt": "how many?"})) == [QUESTION]


def test_system_prompt_in_a_field_of_its_own_is_the_first_message(tokenizer, encode):
    expected = [SYSTEM, QUESTION, ANSWER]
    turns = [{"from": "human", "value": "how many?"}, {"from": "gpt", "value": "24 clips"}]
    assert chat_of({"conversations": turns, "system": "be brief"}).messages == expected
    assert chat_of({"conversations": turns, "system": ""}).messages == expected[1:]
    assert chat_of({"messages": expected[1:], "system": "linux"}).messages == expected[1:]
    named = {"system_field": "instruction"}
    for fields in (
        {"messages": expected[1:]}, {"messages": expected}, {"prompt": [QUESTION], "completion": [ANSWER]},
    ):  # fmt: skip
        assert chat_of(fields | {"instruction": "be brief"}, **named).messages == expected
    pair = row_of({"prompt": "how many?", "chosen": "24 clips", "rejected": [LAST], "instruction": "be brief"})
    assert texts_of(**named).conversations(pair) == (expected, [SYSTEM, QUESTION, LAST])
    text = {"prompt": "how many?", "completion": "24 clips", "instruction": "be brief"}
    for prompts_only in (False, True):
        (example,) = encode(tokenizer, [text], chat_template=True, prompts_only=prompts_only, **named)
        rendered = tokenizer.apply_chat_template(expected[:2], tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(example.prompt_ids) == rendered
    with pytest.raises(InputError, match="line 1 has one system prompt in field 'instruction' and another as its"):
        chat_of({"messages": expected, "instruction": "be verbose"}, **named)


def test_messages_in_a_table_are_json_text(tmp_path):
    path = tmp_path / "a.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("messages", "tools"), (json.dumps([QUESTION, ANSWER]), json.dumps([TOOL]))])
    (row,) = read_rows(DataSource(path=str(path)))
    assert texts_of().messages(row) == [QUESTION, ANSWER]
    assert texts_of().tools(row) == [TOOL]


def test_formats_can_be_chosen():
    conversations = CHATS["OpenHermes"]["conversations"]
    fields = {"prompt": "a", "completion": "b", "conversations": conversations, "turns": conversations}
    assert texts_of().format_of(row_of(fields)) == "prompt_completion"
    expected = chat_of(CHATS["UltraChat"]).messages
    assert chat_of(fields, format="sharegpt").messages == expected
    assert chat_of(fields, format="sharegpt", messages_field="turns").messages == expected
    assert chat_of(fields, format="messages").messages == expected
    chosen = chat_of({"prompt": [QUESTION], "completion": [ANSWER], "messages": expected}, format="prompt_completion")
    assert chosen.messages == [QUESTION, ANSWER]


def test_turns_to_train_on(tokenizer, encode):
    messages = [QUESTION, ANSWER | {"weight": 0}, SECOND, LAST | {"weight": 1}]
    assert chat_of({"messages": messages}, train_on="all").turns == [3]
    assert all("weight" not in message for message in chat_of({"messages": messages}).messages)
    unweighted = [QUESTION, ANSWER, SECOND, LAST]
    assert chat_of({"messages": unweighted}, train_on="all").turns == [1, 3]
    assert chat_of({"messages": [*unweighted[:3], LAST | {"weight": 0}]}).turns == [1]
    # the completion says what is trained on: nothing of the prompt, all of the completion
    split = {"prompt": [QUESTION, ANSWER, SECOND], "completion": [LAST, SECOND, ANSWER]}
    for train_on in ("last", "all"):
        assert chat_of(split, train_on=train_on).turns == [3, 5]
        assert chat_of(split, train_on=train_on).prompt_messages == 3
    (example,) = encode(tokenizer, [{"messages": messages}], train_on="all")
    assert counted(tokenizer, example) == ["72" + END]
    assert not encode(tokenizer, [{"messages": [QUESTION, ANSWER | {"weight": 0}]}])
    assert encode.skipped == {"no assistant turn with a weight of 1": 1}


def test_completions_are_generated_after_the_messages_before_each_trained_turn(tokenizer, encode):
    def prompts(*messages, **settings):
        rows = encode(tokenizer, [{"messages": list(messages)}], prompts_only=True, **settings)
        assert not any(row.counted.any() for row in rows)
        return [tokenizer.decode(row.input_ids) for row in rows]

    def rendered(*messages):
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)

    first, last, open_end = rendered(QUESTION), rendered(QUESTION, ANSWER, SECOND), (QUESTION, ANSWER, SECOND)
    assert prompts(QUESTION, ANSWER, SECOND, LAST) == [last]
    assert prompts(QUESTION, ANSWER, SECOND, LAST, train_on="all") == [first, last]
    assert prompts(*open_end) == [last]
    assert prompts(*open_end, train_on="all") == [first, last]
    assert prompts(QUESTION, ANSWER | {"weight": 0}, SECOND, LAST, train_on="all") == [last]
    assert prompts(QUESTION, ANSWER, SECOND, LAST | {"weight": 0}, train_on="all") == [first]


def test_tool_calls_of_all_forms_are_the_same():
    question, reply = {"role": "user", "content": "Weather in Bern?"}, {"role": "assistant", "content": "Sunny."}
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    openai = [
        question,
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Bern"}'}}
        ]},
        {"role": "tool", "tool_call_id": "call_1", "content": '{"sky": "clear"}'},
        reply,
    ]  # fmt: skip
    chat = chat_of({"messages": openai, "tools": [TOOL]})
    assert chat.messages[1]["tool_calls"] == [CALL | {"id": "call_1"}]
    assert chat.messages[2] == {"role": "tool", "tool_call_id": "call_1", "content": '{"sky": "clear"}'}
    legacy = [
        question,
        {
            "role": "assistant",
            "content": None,
            "function_call": {"name": "get_weather", "arguments": '{"city":"Bern"}'},
        },
        {"role": "function", "name": "get_weather", "content": "clear"},
        reply,
    ]
    assert chat_of({"messages": legacy}).messages[1:3] == [
        called, {"role": "tool", "name": "get_weather", "content": "clear"}
    ]  # fmt: skip
    sharegpt = [
        {"from": "human", "value": "Weather in Bern?"},
        {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"city": "Bern"}}'},
        {"from": "observation", "value": "clear"},
        {"from": "gpt", "value": "Sunny."},
    ]
    assert chat_of({"conversations": sharegpt}).messages == [
        question, called, {"role": "tool", "content": "clear"}, reply
    ]  # fmt: skip
    bare = [question, {"role": "assistant", "tool_calls": json.dumps([CALL["function"]])}, reply]
    assert chat_of({"messages": bare}).messages[1] == called


def test_tools_are_schemas_or_their_json_text():
    xlam = {
        "id": 0,
        "query": "Weather in Bern?",
        "answers": '[{"name": "get_weather", "arguments": {"city": "Bern"}}]',
        "tools": json.dumps([TOOL["function"]]),
    }
    fields = {"prompt_field": "query", "completion_field": "answers"}
    assert texts_of(**fields).tools(row_of(xlam)) == [TOOL]
    for value in ([TOOL], [TOOL["function"]], json.dumps([TOOL]), [json.dumps(TOOL)]):
        assert texts_of().tools(row_of({"tools": value})) == [TOOL]
        assert texts_of(tools_field="functions").tools(row_of({"functions": value})) == [TOOL]
        assert texts_of(tools_field=None).tools(row_of({"tools": value})) is None
    for empty in ({}, {"tools": None}, {"tools": []}, {"tools": ""}, {"tools": "[]"}, {"tools": "null"}):
        assert texts_of().tools(row_of(empty)) is None


@pytest.mark.parametrize("form", ["messages", "prompt and completion", "text", "preference"])
def test_tools_are_rendered_in_every_form(encode, form):
    tokenizer = tiny_tokenizer(chat_template="{% for t in tools %}[{{ t.function.name }}]{% endfor %}" + CHAT_TEMPLATE)
    rows = {
        "messages": {"messages": [QUESTION, ANSWER]},
        "prompt and completion": {"prompt": [QUESTION], "completion": [ANSWER]},
        "text": {"prompt": "how many?", "completion": "24 clips"},
        "preference": {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [LAST]},
    }
    settings = {"format": "preference"} if form == "preference" else {}
    plain = tiny_tokenizer().apply_chat_template([QUESTION], tokenize=False, add_generation_prompt=True)
    for prompts_only in (False, True):
        row = rows[form] | {"tools": json.dumps([TOOL["function"]])}
        (example,) = encode(tokenizer, [row], chat_template=True, prompts_only=prompts_only, **settings)
        assert tokenizer.decode(example.prompt_ids) == "[get_weather]" + plain


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (
            "hammer",
            "field 'tools' is not JSON: .*; correct the row, or set data.train.tools_field to null if the field",
        ),
        ({"name": "f"}, "field 'tools' is a dict, not a list of tool schemas; correct the row, or set"),
        ([{"description": "x"}], "field 'tools', tool 1 has no function with a name; correct the row, or set"),
        ([TOOL, "saw"], "field 'tools', tool 2 is not JSON"),
        (5, "field 'tools' is a int, not a list"),
    ],
)
def test_malformed_tools_are_errors_that_name_the_row(value, sentence):
    with pytest.raises(InputError, match=f"^rows.jsonl, line 1: {sentence}"):
        texts_of().tools(row_of({"tools": value}))


ASSISTANT = {"role": "assistant", "content": ""}
MESSAGE_ERRORS = {
    "message 1 of 'messages', part 2 is of type 'image_url', but only text is trained on; remove the part or the row": {
        "role": "user",
        "content": [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "x.png"}}],
    },
    "message 1 of 'messages', part 1 is of type 'image'": {"role": "user", "content": [{"type": "image"}]},
    "message 1 of 'messages', part 1 has no text": {"role": "user", "content": [{"type": "text", "text": 5}]},
    "message 1 of 'messages', part 1 is a int": {"role": "user", "content": [5]},
    "message 1 of 'messages' has the weight 0.5; give 0": {"role": "assistant", "content": "x", "weight": 0.5},
    "message 1 of 'messages', tool call 1: arguments is not JSON": ASSISTANT
    | {"tool_calls": [{"function": {"name": "f", "arguments": "{city: Bern}"}}]},
    "message 1 of 'messages', tool call 1: arguments is not JSON: the key 'a' occurs twice": ASSISTANT
    | {"tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1, "a": 2}'}}]},
    "message 1 of 'messages', tool call 1 has arguments that are a list": ASSISTANT
    | {"tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
    "message 1 of 'messages', tool call 2 has no function with a name": ASSISTANT | {"tool_calls": [CALL, {"id": "1"}]},
    "message 1 of 'messages' has tool_calls that are a int": ASSISTANT | {"tool_calls": 5},
    "message 1 of 'messages' calls a tool, but its role is 'user'": {"role": "user", "tool_calls": [CALL]},
    "message 1 of 'messages' is not JSON": {"from": "function_call", "value": "get_weather(Bern)"},
    "message 1 of 'messages' has the role .'user'.; the roles are": {"role": ["user"], "content": "x"},
}  # fmt: skip


@pytest.mark.parametrize("sentence", MESSAGE_ERRORS)
def test_malformed_messages_are_errors_that_name_row_and_message(sentence):
    with pytest.raises(InputError, match=f"^rows.jsonl, line 1: {sentence}"):
        texts_of().messages(row_of({"messages": [MESSAGE_ERRORS[sentence], LAST]}))


def test_malformed_conversational_prompts_are_errors(tokenizer, encode):
    with pytest.raises(InputError, match="line 1: 'prompt' ends with a message of role assistant, but a prompt ends"):
        encode(tokenizer, [{"prompt": [QUESTION, ANSWER], "completion": [LAST]}])
    with pytest.raises(InputError, match="line 1 ends with a message of role user, so it has no completion"):
        encode(tokenizer, [{"prompt": [QUESTION], "completion": [ANSWER, SECOND]}])
    with pytest.raises(InputError, match="line 1: 'prompt' must be a list of at least one message"):
        encode(tokenizer, [{"prompt": [], "completion": [ANSWER]}])
    with pytest.raises(InputError, match="line 2 has a list in field 'prompt' where text is needed"):
        encode(tokenizer, [{"prompt": "a", "completion": "b"}, {"prompt": [QUESTION], "completion": [ANSWER]}])


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_no_text(tokenizer, encode, number):
    with pytest.raises(InputError, match=f"line 1 has {number} in field 'completion' where text is needed"):
        encode(tokenizer, [{"prompt": "a", "completion": number}])


def test_make_batches_reads_all_forms(tokenizer):
    for fields in CHATS.values():
        (batch,) = make_batches([fields], tokenizer, 1)
        assert tokenizer.decode(batch.targets) == "72" + END
    (batch,) = make_batches(
        [{"turns": CHATS["OpenHermes"]["conversations"]}], tokenizer, 1, messages_field="turns", train_on="all"
    )
    assert tokenizer.decode(batch.targets) == "24 clips" + END + "72" + END


words = st.sampled_from(
    ["user", "assistant", "tool", "human", "function_call", "text", "f", "", "[", '[{"name": "f"}]']
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2) | st.floats() | words | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "role",
                    "content",
                    "from",
                    "value",
                    "type",
                    "text",
                    "tool_calls",
                    "function",
                    "name",
                    "arguments",
                    "weight",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)
names = ["prompt", "completion", "messages", "conversations", "chosen", "rejected", "text", "tools", "system"]


@pytest.mark.slow
@given(fields=st.dictionaries(st.sampled_from(names), anything, min_size=1), pairs=st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_fields_are_read_or_refused_in_one_sentence(fields, pairs):
    texts, row = texts_of(), row_of(fields)
    with contextlib.suppress(InputError):
        texts.tools(row)
    with contextlib.suppress(InputError):
        texts.prompt_messages(row, pairs=pairs)
    with contextlib.suppress(InputError):
        if texts.format_of(row, pairs=pairs) == "preference":
            chosen, rejected = texts.conversations(row)
            assert chosen[:-1] == rejected[:-1]
        else:
            chat = texts.conversation(row)
            assert 0 < chat.prompt_messages <= len(chat.messages)
            for message in chat.messages:
                assert message["role"] in ROLES and isinstance(message["content"], str)
            assert all(chat.messages[turn]["role"] == "assistant" for turn in chat.turns)
