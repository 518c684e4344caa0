"""The chat template of a run: its date, the template saved with the student, and notes on what may not be intended."""

import datetime
import json
import shutil

import pytest
from transformers import AutoTokenizer

from rayk.commands.doctor import examine
from rayk.config import DataConfig, load_config, parse_config
from rayk.data.chat_template import ChatTemplate
from rayk.data.template_differences import templates_differ
from rayk.errors import InputError
from rayk.run import distill
from rayk.run.directory import with_pinned_date, write_config
from rayk.run.inputs import read_inputs
from tests.runs import settings
from tests.tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer

DATED = "{{ strftime_now('%d %b %Y') }}\n" + CHAT_TEMPLATE
OTHER = CHAT_TEMPLATE.replace("<|assistant|>\n{% endif", "<|assistant|>{% endif")


def run_settings(folder, own_template=None, **data):
    tiny_model(folder / "student", hidden=16, layers=1, tokenizer=tiny_tokenizer(chat_template=own_template))
    values = settings(folder, str(folder / "student"), steps=2)
    values["data"] |= data
    return values


def test_the_chosen_template_is_saved_with_the_student(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(OTHER)
    result = distill(parse_config(run_settings(tmp_path, chat_template=str(path))))
    assert AutoTokenizer.from_pretrained(result.model).chat_template == OTHER


def test_a_shipped_template_begins_with_bos_where_the_tokenizer_does():
    messages = [{"role": "user", "content": "how many?"}]
    for bos in (False, True):
        data = DataConfig(chat_template="chatml")
        tokenizer = tiny_tokenizer(bos=bos, chat_template=None)
        text = ChatTemplate.from_settings(data, tokenizer).render(messages, "row 1", add_generation_prompt=True)
        start = "<bos>" if bos else ""
        assert text == f"{start}<|im_start|>user\nhow many?<|im_end|>\n<|im_start|>assistant\n"


def test_a_resumed_run_keeps_the_date_of_its_templates(tmp_path):
    config = parse_config(run_settings(tmp_path, DATED))
    today = with_pinned_date(config)
    assert today.data.chat_template_date == datetime.date.today()
    first = config.model_copy(
        update={"data": config.data.model_copy(update={"chat_template_date": datetime.date(2025, 3, 9)})}
    )
    write_config(first)
    assert with_pinned_date(config) == first == with_pinned_date(first)
    assert load_config(tmp_path / "run" / "config.yaml").data.chat_template_date == datetime.date(2025, 3, 9)


def test_a_run_started_on_another_day_is_resumed_with_its_rows(tmp_path):
    values = run_settings(tmp_path, DATED)
    values["data"]["chat_template"] = True
    started = parse_config(values | {"data": values["data"] | {"chat_template_date": "2025-03-09"}})
    distill(started)
    assert distill(parse_config(values), resume=True).summary["steps"] == 2
    changed = values | {"data": values["data"] | {"chat_template_date": "2025-03-10"}}
    with pytest.raises(InputError, match="started with another 'data.chat_template_date'"):
        distill(parse_config(changed), resume=True)


def test_templates_are_compared_by_what_they_print():
    tokenizer = tiny_tokenizer()
    own, other = ChatTemplate(tokenizer), ChatTemplate(tokenizer, OTHER)
    assert templates_differ(own, ChatTemplate(tokenizer, CHAT_TEMPLATE + "{# a comment #}")) is None
    assert templates_differ(own, other) == "in a question with its generation prompt, '\\n' instead of nothing"
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHAT_TEMPLATE
    assert templates_differ(own, ChatTemplate(tokenizer, no_system)) == "only one of them accepts a system prompt"


def notes_of(config, training=True):
    return read_inputs(parse_config(config), {}, training=training).notes


def test_doctor_notes_a_teacher_with_another_template_and_a_variable_without_effect(tmp_path):
    values = run_settings(tmp_path, CHAT_TEMPLATE)
    values["data"] |= {"chat_template": True, "chat_template_kwargs": {"enable_thinking": False}}
    values |= {"method": {"kind": "logit_kd"}, "teachers": [{"name": "big", "model": str(tmp_path / "teacher")}]}
    for template, found in ((CHAT_TEMPLATE, None), (OTHER, "another chat template"), (None, "no chat template")):
        shutil.rmtree(tmp_path / "teacher", ignore_errors=True)
        tiny_model(tmp_path / "teacher", hidden=16, layers=1, tokenizer=tiny_tokenizer(chat_template=template))
        notes = notes_of(values)
        assert notes[0].startswith("data.chat_template_kwargs sets 'enable_thinking', which the chat template does not")
        assert len(notes) == (1 if found is None else 2)
        assert found is None or found in notes[1]
    values["data"] |= {"chat_template": False, "chat_template_kwargs": {}}
    assert notes_of(values) == ()
    chats = tmp_path / "chats.jsonl"
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    chats.write_text(json.dumps(row) + "\n")
    values["data"]["train"] = {"path": str(chats)}
    assert "has no chat template" in notes_of(values)[0]
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(values))
    assert any(check.state == "note" and "has no chat template" in check.text for check in examine(str(path)))


def test_a_note_says_when_a_chat_model_continues_plain_prompts(tmp_path):
    values = run_settings(tmp_path, chat_template="chatml")
    tiny_model(tmp_path / "teacher", hidden=16, layers=1, tokenizer=tiny_tokenizer(chat_template=CHAT_TEMPLATE))
    values |= {"method": {"kind": "supervised"}, "teachers": [{"name": "big", "model": str(tmp_path / "teacher")}]}

    def notes(kind, **synthesis):
        data = {"chat_template": "chatml"} if kind == "self_instruct" else values["data"]
        return notes_of(values | {"data": data, "synthesis": {"kind": kind} | synthesis}, training=False)

    assert notes("responses") == notes("responses", chat=True) == notes("self_instruct", chat=True) == ()
    for found in (notes("responses", chat=False), notes("self_instruct")):
        [note] = found
        assert note.startswith("Teacher 'big' continues plain prompts, although it has a chat template")


def test_a_base_model_without_a_template_is_told_the_choices(tmp_path):
    values = run_settings(tmp_path)
    values["data"]["chat_template"] = True
    with pytest.raises(InputError, match=r"set data.chat_template to a .jinja file or to one of: chatml"):
        read_inputs(parse_config(values), {})
    values["data"]["chat_template"] = "chatmi"
    with pytest.raises(InputError, match="data.chat_template 'chatmi' is neither a file with a template nor one of"):
        read_inputs(parse_config(values), {})
    values["data"] |= {"chat_template": str(tmp_path / "missing.jinja")}
    with pytest.raises(InputError, match=r"data.chat_template: '.*missing.jinja' does not exist"):
        read_inputs(parse_config(values), {})
    values["data"] |= {"chat_template": True, "chat_template_kwargs": {"tools": []}}
    with pytest.raises(InputError, match="data.chat_template_kwargs: sets tools, which come from the rows"):
        parse_config(values)


def test_the_path_of_a_template_is_relative_to_the_config_file(tmp_path):
    (tmp_path / "mine.jinja").write_text(OTHER)
    path = tmp_path / "config.yaml"
    path.write_text(
        "{student: {model: m}, method: {kind: supervised}, data: {train: {path: r.jsonl}, chat_template: mine.jinja}}"
    )
    assert load_config(path).data.chat_template == str(tmp_path / "mine.jinja")
