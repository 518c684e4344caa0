"""`rayk init` writes a config for given models and data, which `rayk doctor` and `rayk run` accept as it is."""

import json

import pytest
import yaml

from rayk.commands.doctor import examine
from rayk.commands.init import init
from rayk.config import load_config
from rayk.errors import InputError
from rayk.run import distill
from tests.runs import write_rows
from tests.tiny import tiny_model, tiny_tokenizer

CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"


def rows_file(folder, *rows, name="rows.jsonl", copies=8):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * copies))
    return path


def findings(path, *states):
    return [check.text for check in examine(str(path)) if check.state in states]


@pytest.mark.parametrize("method", [None, "supervised", "logit_kd", "on_policy", "minillm", "in_context"])
def test_doctor_accepts_the_config_of_each_method(tmp_path, tiny_teacher, tiny_student, method):
    data = write_rows(tmp_path / "train.jsonl")
    write_rows(tmp_path / "test.jsonl", count=5, seed=9)
    path = tmp_path / "run.yaml"
    assert init(tiny_teacher, tiny_student, str(data), method, path) == []
    config = load_config(path)
    assert config.method.kind == (method or "logit_kd")
    assert findings(path, "wrong") == []
    assert config.data.evaluation is not None
    assert config.evaluation.answer_field == (None if method == "in_context" else "answer")
    assert (config.training.batch_size, config.training.epochs) == (8, 3)


def test_run_accepts_the_config(tmp_path, tiny_student):
    data = write_rows(tmp_path / "train.jsonl")
    write_rows(tmp_path / "test.jsonl", count=5, seed=9)
    path = tmp_path / "run.yaml"
    init(None, tiny_student, str(data), None, path)
    config = load_config(path, ["training.workers=0", "training.epochs=1"], output=str(tmp_path / "run"))
    summary = distill(config).summary
    assert summary["method"] == "supervised" and "accuracy" in summary["student"]


def test_held_out_rows_may_have_other_fields(tmp_path, tiny_student):
    data = rows_file(tmp_path, {"prompt": "1 + 1", "answer": "2"}, name="train.jsonl")
    rows_file(tmp_path, {"question": "1 + 1", "completion": "2"}, name="test.jsonl")
    path = tmp_path / "run.yaml"
    assert init(None, tiny_student, str(data), None, path) == []
    config = load_config(path)
    assert (config.data.train.prompt_field, config.data.train.completion_field) == ("prompt", "answer")
    assert (config.data.evaluation.prompt_field, config.data.evaluation.completion_field) == ("question", "completion")
    assert findings(path, "wrong") == []


@pytest.mark.parametrize("content", ["", '{"a": 1}\n', "no JSON"])
def test_a_file_that_cannot_be_read_is_not_used_as_held_out_rows(tmp_path, tiny_student, content):
    data = write_rows(tmp_path / "train.jsonl")
    (tmp_path / "test.jsonl").write_text(content)
    (note,) = init(None, tiny_student, str(data), None, tmp_path / "run.yaml")
    assert note.startswith(f"'{tmp_path}/test.jsonl' is not used as held-out rows: ")
    assert load_config(tmp_path / "run.yaml").data.evaluation is None


def test_paths_in_the_configs_folder_are_relative(tmp_path, tiny_student, monkeypatch):
    (tmp_path / "project" / "data").mkdir(parents=True)
    data = write_rows(tmp_path / "project" / "data" / "train.jsonl")
    path = tmp_path / "project" / "run.yaml"
    init(None, tiny_student, str(data), None, path)
    values = yaml.safe_load(path.read_text())
    assert (values["data"]["train"]["path"], values["student"]["model"]) == ("./data/train.jsonl", tiny_student)
    monkeypatch.chdir(tmp_path)
    assert findings("project/run.yaml", "wrong") == []


ROWS = {
    "questions": ({"question": "1 + 1", "answer": "2"}, {"prompt_field": "question", "completion_field": "answer"}),
    "alpaca": (
        {"instruction": "Add.", "input": "1 + 1", "output": "2"},
        {"prompt_template": "{instruction}\n\n{input}", "completion_field": "output"},
    ),
    "conversations": (
        {"chat": [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]},
        {"messages_field": "chat"},
    ),
    "sharegpt": ({"conversations": [{"from": "human", "value": "1 + 1"}, {"from": "gpt", "value": "2"}]}, {}),
    "conversational": (
        {"prompt": [{"role": "user", "content": "1 + 1"}], "completion": [{"role": "assistant", "content": "2"}]},
        {},
    ),
    "text": ({"text": "1 + 1 = 2"}, {}),
    "pairs": ({"question": "1 + 1", "chosen": "2", "rejected": "3"}, {"prompt_field": "question"}),
}


@pytest.mark.parametrize(("row", "settings"), ROWS.values(), ids=ROWS.keys())
def test_fields_of_the_rows_are_recognized(tmp_path, row, settings):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tiny_model(tmp_path / "student", hidden=16, layers=1, tokenizer=tokenizer)
    path = tmp_path / "run.yaml"
    init(None, str(tmp_path / "student"), str(rows_file(tmp_path, row)), None, path)
    values = yaml.safe_load(path.read_text())
    assert {k: v for k, v in values["data"]["train"].items() if k != "path"} == settings
    assert values["method"]["kind"] == ("preference" if "chosen" in row else "supervised")
    is_chat = any(isinstance(value, list) for value in row.values())
    assert values["data"]["chat_template"] is not (is_chat or "text" in row)
    assert findings(path, "wrong") == []


def test_rows_without_completions_are_generated_by_the_student_or_the_teacher(tmp_path, tiny_teacher, tiny_student):
    data = rows_file(tmp_path, {"prompt": [{"role": "user", "content": "1 + 1"}]})
    init(tiny_teacher, tiny_student, str(data), None, tmp_path / "chats.yaml")
    assert load_config(tmp_path / "chats.yaml").method.kind == "on_policy"
    data = rows_file(tmp_path, {"prompt": "1 + 1"})
    init(tiny_teacher, tiny_student, str(data), None, tmp_path / "policy.yaml")
    assert load_config(tmp_path / "policy.yaml").method.kind == "on_policy"
    other = tmp_path / "other"
    tiny_model(other, tokenizer=tiny_tokenizer(sentences=("entirely different words make other merges " * 9,)))
    (note,) = init(str(other), tiny_student, str(data), None, tmp_path / "synthesis.yaml")
    assert "have different tokenizers" in note
    config = load_config(tmp_path / "synthesis.yaml")
    assert config.method.kind == "supervised" and config.synthesis.kind == "responses"
    assert findings(tmp_path / "synthesis.yaml", "wrong") == []
    with pytest.raises(InputError, match="compares distributions, but teacher and student have different tokenizers"):
        init(str(other), tiny_student, str(data), "logit_kd", tmp_path / "kd.yaml")
    with pytest.raises(InputError, match="give a teacher that generates them with --teacher"):
        init(None, tiny_student, str(data), None, tmp_path / "alone.yaml")


def test_a_url_is_an_endpoint(tmp_path, tiny_student):
    path, url = tmp_path / "run.yaml", "http://localhost:9/v1"
    data = rows_file(tmp_path, {"prompt": "1 + 1"})
    (note,) = init(url, tiny_student, str(data), None, path)
    assert "does not list its models" in note
    (teacher,) = load_config(path).teachers
    assert (teacher.engine.kind, teacher.engine.base_url, teacher.engine.api_key_variable) == ("openai", url, None)
    with pytest.raises(InputError, match="an endpoint returns only text; use --method supervised"):
        init(url, tiny_student, str(data), "on_policy", tmp_path / "other.yaml")


def test_without_models_and_data_an_example_is_written(tmp_path):
    notes = init(None, None, None, None, tmp_path / "run.yaml")
    assert [note.split(" is an example")[0] for note in notes] == [
        "data.train.path", "student: Qwen/Qwen3-0.6B", "teacher: Qwen/Qwen3-8B",
    ]  # fmt: skip
    config = load_config(tmp_path / "run.yaml")
    assert (config.method.kind, config.training.batch_size) == ("logit_kd", 32)


def test_wrong_arguments_are_one_sentence(tmp_path, tiny_student):
    data = rows_file(tmp_path, {"prompt": "1 + 1", "completion": "2"})
    path = tmp_path / "run.yaml"
    for arguments, sentence in [
        ((None, tiny_student, str(data), "gkd"), "--method 'gkd' is unknown; choose one of supervised, logit_kd"),
        ((None, tiny_student, str(data), "logit_kd"), "needs a teacher; give one with --teacher"),
        ((None, tiny_student, str(data), "preference"), "needs rows with 'chosen' and 'rejected'"),
        ((None, tiny_student, str(tmp_path / "none.jsonl"), None), "none.jsonl' does not exist"),
        ((None, str(tmp_path / "none"), str(data), None), "none' does not exist"),
        ((None, tiny_student, str(rows_file(tmp_path, {"a": "b"}, name="odd.jsonl")), None), "has no field with a pro"),
    ]:
        with pytest.raises(InputError, match=sentence):
            init(*arguments, path)
        assert not path.exists()
    path.write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        init(None, tiny_student, str(data), None, path)
