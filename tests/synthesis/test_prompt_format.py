"""A model reads a request as plain text, in its chat template, or as the messages of an endpoint."""

import datetime

import pytest

from rayk.config import TeacherConfig
from rayk.engines.base import EngineInfo, SamplingParameters
from rayk.errors import InputError
from rayk.synthesis.prompt_format import PromptFormat
from rayk.synthesis.requests import CompletionRequest
from rayk.synthesis.store import StoredCompletion
from tests.tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer

DATED = "{{ strftime_now('%d %b %Y') }}\n" + CHAT_TEMPLATE
SHORT = SamplingParameters(8)


@pytest.fixture
def model(tmp_path):
    """The folder of a model whose chat template prints today's date."""
    tiny_model(tmp_path / "dated", hidden=16, layers=1, tokenizer=tiny_tokenizer(chat_template=DATED))
    return str(tmp_path / "dated")


def format_of(model, engine="transformers", chat=None, reads_chat=False, **given):
    info = EngineInfo(model, 100, 40, "", "float32", "cpu", (), engine=engine, applies_chat_template=reads_chat)
    return PromptFormat(info, TeacherConfig(name="big", model=model, engine={"kind": engine}), chat, **given)


def request(prompt="Hi", **given):
    return CompletionRequest(prompt, 0, SHORT, **given)


def test_prompts_are_wrapped_in_the_template_if_the_student_reads_chats_or_the_settings_say_so(model):
    for chat, prefers, wraps in ((None, False, False), (None, True, True), (False, True, False), (True, False, True)):
        assert format_of(model, chat=chat, prefers_chat=prefers).wraps is wraps
    plain = format_of(model).format(request())
    assert plain.read == plain.text == "Hi"
    assert list(plain.sent) == tiny_tokenizer()("Hi").input_ids


def test_templates_print_the_given_date(model):
    wrapped = format_of(model, chat=True, date=datetime.date(2025, 3, 9)).format(request())
    assert wrapped.read == "09 Mar 2025\n<|user|>\nHi<|end|>\n<|assistant|>\n"
    assert tiny_tokenizer().decode(wrapped.sent) == wrapped.read
    today = format_of(model, chat=True).format(request())
    assert today.read.startswith(f"{datetime.date.today():%d %b %Y}\n")


def test_a_raw_prompt_is_sent_as_it_is(model):
    raw = format_of(model, chat=True).format(request(raw_prompt="<|user|>\n"))
    assert raw.read == "<|user|>\n"
    assert list(raw.sent) == tiny_tokenizer()("<|user|>\n").input_ids


def test_an_endpoint_gets_messages_and_wraps_them_itself():
    endpoint = format_of("m", engine="openai", reads_chat=True)
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"})
    formatted = endpoint.format(request(messages=messages))
    assert (endpoint.wraps, endpoint.is_chat) == (False, True)
    assert (formatted.sent, formatted.read) == (list(messages), None)
    with pytest.raises(InputError, match="a chat template of its own; remove synthesis.chat"):
        format_of("m", engine="openai", chat=True)
    with pytest.raises(InputError, match="'big', an endpoint, whose calls of tools would be lost"):
        endpoint.format(request(tools=[{"name": "add"}]))
    with pytest.raises(InputError, match=r"2 messages can only be sent in a chat template, .* engine.chat"):
        format_of("m", engine="openai").format(request(messages=messages))


def test_a_prompt_without_room_for_its_completion_is_named(model):
    short, long = (format_of(model).format(request(text)) for text in ("Hi", "a b " * 20))
    assert format_of(model).length_error(short, SHORT) == ""
    assert "leaves no room for 8 new tokens: the model is limited to 40" in format_of(model).length_error(long, SHORT)


def test_a_students_writing_ends_where_its_training_ends(model):
    tokenizer = tiny_tokenizer(chat_template=DATED)
    turn = tokenizer.convert_tokens_to_ids("<|end|>")
    assert format_of(model, chat=False).trained_ends() == (tokenizer.eos_token_id,)
    assert format_of(model, chat=True).trained_ends() == (tokenizer.eos_token_id, turn)


def test_thoughts_are_split_from_answers_and_not_counted(model):
    stored = StoredCompletion("key", "<think>hm</think>Yes", 9, None, "stop")
    split = format_of(model).without_thought(stored)
    assert (split.text, split.thought) == ("Yes", "hm")
    assert split.tokens == len(tiny_tokenizer()("Yes").input_ids)
