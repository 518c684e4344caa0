"""Rows become prompts with their right answers, and a row that cannot is named."""

import json

import pytest
from pydantic import TypeAdapter

from rayk.config import AnswerConfig, DataSource, SynthesisConfig
from rayk.engines.base import SamplingParameters
from rayk.errors import InputError
from rayk.synthesis import RECIPES, PromptGeneratingRecipe, fingerprint, read_prompts
from rayk.synthesis.prompts import is_right


def read(tmp_path, *rows, answer=None, **source):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_prompts(DataSource(path=str(path), **source), "data.train.", answer)


def test_prompts_are_what_the_student_reads(tmp_path):
    rows = [{"question": "2 + 2?", "answer": "4"}, {"question": "3 + 3?", "answer": "6"}]
    assert [each.text for each in read(tmp_path, *rows, prompt_field="question")] == ["2 + 2?", "3 + 3?"]
    first, _ = read(tmp_path, *rows, prompt_template="Q: {question}")
    assert (first.text, first.fields["answer"], first.truth) == ("Q: 2 + 2?", "4", None)
    assert first.where.endswith("rows.jsonl, line 1")
    said = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    assert [each.text for each in read(tmp_path, said)] == ["Hi"]


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho"},
    {"role": "user", "content": "2 + 2?"},
]


def test_prompts_may_be_conversations(tmp_path):
    answer = {"role": "assistant", "content": "4"}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    forms = [
        {"messages": [*CHAT, answer]},
        {"messages": CHAT},
        {"prompt": CHAT, "completion": [answer]},
        {"prompt": CHAT, "chosen": [answer], "rejected": [{"role": "assistant", "content": "5"}]},
        {"conversations": [{"from": each["role"], "value": each["content"]} for each in [*CHAT, answer]]},
    ]
    for row in forms:
        form = {"format": "preference"} if "chosen" in row else {}
        (prompt,) = read(tmp_path, row | {"tools": tools}, **form)
        assert (list(prompt.messages), prompt.tools, prompt.has_context) == (CHAT, tools, True)
        assert prompt.text == "System: Be brief.\n\nUser: Hi\n\nAssistant: Ho\n\nUser: 2 + 2?"
        other = prompt.with_question("Q: 2 + 2?")
        assert (prompt.question, other.question, other.messages[:3]) == ("2 + 2?", "Q: 2 + 2?", prompt.messages[:3])
        assert other.text.endswith("Ho\n\nUser: Q: 2 + 2?")
    (single,) = read(tmp_path, {"messages": CHAT[1:2]})
    assert (single.text, single.has_context, single.with_question("Ho").text) == ("Hi", False, "Ho")
    request = single.request(0, SamplingParameters())
    assert (request.prompt, request.messages) == ("Hi", ())


def test_the_right_answer_is_found_by_field_and_pattern(tmp_path):
    answer = AnswerConfig(type="number", pattern="#### (.+)")
    row = {"prompt": "?", "answer": "48/2 = 24, 24 + 1,000\n#### 1,024"}
    (prompt,) = read(tmp_path, row, answer=answer)
    assert prompt.truth == "1,024"
    assert is_right("1024", prompt.truth, answer)
    assert not is_right("24", prompt.truth, answer)
    assert not is_right(None, prompt.truth, answer)
    (prompt,) = read(tmp_path, {"prompt": "?", "sum": 4}, answer=AnswerConfig(type="number", field="sum"))
    assert prompt.truth == "4"


def test_yes_and_no_may_be_true_and_false(tmp_path):
    rows = [{"prompt": "Is it?", "answer": answer} for answer in (True, False, "Yes.")]
    answer = AnswerConfig(type="yes_no")
    read_rows = read(tmp_path, *rows, answer=answer)
    assert [each.truth for each in read_rows] == ["yes", "no", "Yes."]
    assert is_right("yes", read_rows[0].truth, answer)
    with pytest.raises(InputError, match="with its type 'number' in the right answer 'True'"):
        read(tmp_path, rows[0], answer=AnswerConfig(type="number"))


@pytest.mark.parametrize(
    ("row", "settings", "said"),
    [
        ({"prompt": " "}, {}, "line 1 has an empty prompt"),
        ({"text": "once"}, {}, "is plain text, which has no prompt; set data.train.prompt_field"),
        ({"foo": "bar"}, {}, "has neither 'prompt'"),
        ({"messages": [{"role": "system", "content": "a"}]}, {}, "ends with a message of role system, so"),
        ({"messages": [{"role": "user", "content": ""}]}, {}, "has an empty prompt"),
        ({"prompt": "?"}, {"answer": AnswerConfig()}, "has no field 'answer' with the right answer; set synth"),
        ({"prompt": "?", "answer": "4"}, {"answer": AnswerConfig(pattern="#### (.+)")}, "with its pattern '#### "),
        ({"prompt": "?", "answer": "four"}, {"answer": AnswerConfig(type="number")}, "with its type 'number' in"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_is_named(tmp_path, row, settings, said):
    with pytest.raises(InputError, match="rows.jsonl, line 1") as caught:
        read(tmp_path, row, **settings)
    assert said in str(caught.value)


def test_fingerprints_depend_on_texts_and_order_and_whole_ones_on_fields(tmp_path):
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}]
    other = [rows[0], rows[1] | {"answer": "3"}]
    texts = read(tmp_path, *rows)
    assert fingerprint(texts) == fingerprint(read(tmp_path, *other)) == fingerprint(read(tmp_path, *rows))
    assert len({fingerprint(each) for each in (texts, texts[::-1], texts[:1])}) == 3
    wholes = [texts, texts[::-1], read(tmp_path, *other), read(tmp_path, *rows, answer=AnswerConfig())]
    assert len({fingerprint(each, whole=True) for each in wholes}) == 4


@pytest.mark.parametrize("kind", RECIPES)
def test_recipes_generate_prompts_if_their_settings_say_so(kind):
    settings = TypeAdapter(SynthesisConfig).validate_python({"kind": kind})
    assert settings.makes_prompts == issubclass(RECIPES[kind], PromptGeneratingRecipe)
