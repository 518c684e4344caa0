"""Errors of settings are complete and helpful, overrides reach text, and paths are relative to the config file."""

import logging
import os
import re
import time

import pytest
import yaml

from rayk.config import check_inputs_exist, load_config, parse_config, with_absolute_paths
from rayk.errors import InputError, SettingsError
from tests.fuzz.limits import bounded_memory

MINIMAL = {
    "teachers": [{"model": "m"}],
    "student": {"model": "s"},
    "data": {"train": {"path": "rows.jsonl"}},
    "method": {"kind": "logit_kd"},
}


def write(folder, values):
    folder.mkdir(exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def errors_of(values):
    with pytest.raises(SettingsError) as caught:
        parse_config(values)
    return caught.value.sentences


def test_all_errors_are_shown_at_once():
    wrong = MINIMAL | {
        "trainng": {}, "training": {"lr": 1, "steps": "many"}, "teachers": [{}],
        "data": {"train": {"path": "p", "x": 1}},
    }  # fmt: skip
    sentences = errors_of(wrong)
    assert len(sentences) == 5
    for start in (
        "teachers.0 needs 'model'", "data.train: unknown key 'x'", "training: unknown key 'lr'",
        "training.steps is 'many', but", "unknown key 'trainng'",
    ):  # fmt: skip
        assert any(sentence.startswith(start) for sentence in sentences), start
    assert all(sentence.endswith((".", "?")) and "\n" not in sentence for sentence in sentences)


def test_sections_that_do_not_fit_are_all_named():
    wrong = MINIMAL | {"teachers": [], "evaluation": {"generation": {}}, "rollouts": {"timeout_seconds": 9999}}
    sentences = errors_of(wrong)
    assert len(sentences) == 3
    assert sentences[0] == "method.kind 'logit_kd' needs a teacher; add one under 'teachers'."


@pytest.mark.parametrize(
    ("place", "key", "hint"),
    [
        ("", "lr", "did you mean 'training.learning_rate'?"),
        ("training", "lr", "did you mean 'learning_rate'?"),
        ("training", "max_steps", "did you mean 'steps'?"),
        ("training", "num_epochs", "did you mean 'epochs'?"),
        ("training", "per_device_train_batch_size", "did you mean 'batch_size'?"),
        ("student", "model_name", "did you mean 'model'?"),
        ("", "model_name_or_path", "did you mean 'student.model'?"),
        ("data", "prompt_field", "it belongs under data.train or data.evaluation or synthesis.prompts."),
        ("", "answer_pattern", "it belongs under evaluation."),
        ("data", "answer_patern", "did you mean 'answer_pattern' under evaluation?"),
        ("training", "lerning_rate", "did you mean 'learning_rate'?"),
        ("", "trainer", "did you mean 'training'?"),
        ("method", "support_k", "did you mean 'support'?"),
    ],
)
def test_an_unknown_key_gets_the_place_it_belongs_to(place, key, hint):
    values = yaml.safe_load(yaml.safe_dump(MINIMAL))
    section = values.setdefault(place, {}) if place else values
    section[key] = 1
    (sentence,) = errors_of(values)
    assert f"unknown key '{key}'; {hint} Allowed: " in sentence


@pytest.mark.parametrize(
    ("kind", "known"), [("gkd", "on_policy"), ("opd", "on_policy"), ("dpo", "preference"), ("sft", "supervised"),
                        ("kd", "logit_kd")],
)  # fmt: skip
def test_a_method_is_known_by_its_other_names(kind, known):
    (sentence,) = errors_of(MINIMAL | {"method": {"kind": kind}})
    assert f"unknown kind '{kind}'; did you mean '{known}'?" in sentence


def test_huge_keys_and_values_are_shortened_quickly():
    began = time.monotonic()
    sentences = errors_of(MINIMAL | {"k" * 100_000: 1, "seed": "x" * 100_000, "method": {"kind": "y" * 100_000}})
    assert time.monotonic() - began < 2
    assert len(sentences) == 3
    assert max(map(len, sentences)) < 500


def test_a_key_that_yaml_reads_as_a_number_is_named():
    (sentence,) = errors_of(MINIMAL | {"route": {"field": "a", "teachers": {7: "teacher"}}})
    assert sentence == "route.teachers: the key 7 is not text; put it in quotes."


@pytest.mark.parametrize("text", ["name: 2024-13-01", "seed: " + "[" * 3000])
def test_values_that_yaml_cannot_build_are_one_sentence(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(InputError, match=r"^The config file .*\.$|is not YAML") as caught:
        load_config(tmp_path / "run.yaml")
    assert "\n" not in str(caught.value)


def bomb(form: str, levels: int = 9) -> str:
    """Nine aliases on each of nine levels: 400 million values in 500 bytes."""
    lines = [form.format(f"a{level}", ", ".join([f"*a{level - 1}"] * 9), level) for level in range(1, levels + 1)]
    return "\n".join(["a0: &a0 {k0: 1}", *lines, f"seed: *a{levels}"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (bomb("{0}: &{0} [{1}]"), "more than 100,000 values"),
        (bomb("{0}: &{0} {{k{2}: [{1}]}}"), "more than 100,000 values"),
        (bomb("{0}: &{0} {{<<: [{1}], k{2}: 1}}"), "too many keys"),
        ("name: &a [*a]", "contains it"), ("seed: " + "[" * 60 + "]" * 60, "more than 50 levels"),
        ("seed: 0x" + "f" * 5000, "more than 64 bits"), ("name: !!timestamp x", "the form that its tag requires"),
        ("seed: !!int ''", "the form that its tag requires"), ('name: "\\ud800"', "surrogate pair"),
        ("name: " + "x" * 1_100_000, "more than 1,048,576 characters"),
    ],
)  # fmt: skip
def test_traps_of_yaml_are_one_sentence(tmp_path, text, reason):
    (tmp_path / "run.yaml").write_text(text)
    with bounded_memory(), pytest.raises(InputError) as caught:
        load_config(tmp_path / "run.yaml")
    assert "is not YAML that rayk reads: " in str(caught.value) and reason in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "overrides", [["training.steps=3", "training=5"], ["training.betas=[0.9, 1]", "training.betas.0.x=1"]]
)
def test_overrides_that_contradict_each_other_are_one_sentence(tmp_path, overrides):
    with pytest.raises(InputError):
        load_config(write(tmp_path, MINIMAL | {"training": {"epochs": 1}}), overrides)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("teachers.0.prompt_template={hint} {prompt}", "{hint} {prompt}"),
        ("teachers.0.prompt_template={prompt}", "{prompt}"),
        ("teachers.0.prompt_template=Question: {prompt}", "Question: {prompt}"),
        ("teachers.0.prompt_template='a: {b}'", "a: {b}"),
        ("teachers.0.prompt_template=null", None),
        ("teachers.0.prompt_template=12", "12"),
    ],
)
def test_overrides_of_text_are_taken_as_text(tmp_path, override, value):
    config = load_config(write(tmp_path, MINIMAL), [override])
    assert config.teachers[0].prompt_template == value


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("chatml", "chatml"), ("12", "12")])
def test_an_override_is_a_truth_value_where_the_setting_takes_one(tmp_path, text, value):
    config = load_config(write(tmp_path, MINIMAL), [f"data.chat_template={text}"])
    assert config.data.chat_template == value


@pytest.mark.parametrize(("given", "other"), [("steps", "epochs"), ("epochs", "steps")])
def test_an_override_of_steps_replaces_the_files_epochs(tmp_path, given, other):
    path = write(tmp_path, MINIMAL | {"training": {other: 3, "batch_size": 4}})
    training = load_config(path, [f"training.{given}=7"]).training
    assert (getattr(training, given), getattr(training, other), training.batch_size) == (7, None, 4)
    with pytest.raises(InputError, match="give 'steps' or 'epochs', not both"):
        load_config(path, [f"training.{given}=7", f"training.{other}=2"])


def test_overrides_inside_free_options_may_be_templates(tmp_path):
    values = MINIMAL | {"method": {"kind": "custom", "path": "a:B"}}
    overrides = ["method.options.ask=Q: {prompt}", "method.options.both={a} {b}", "method.options.numbers={x: 1}"]
    options = load_config(write(tmp_path, values), overrides).method.options
    assert options == {"ask": "Q: {prompt}", "both": "{a} {b}", "numbers": {"x": 1}}


def test_an_override_that_is_not_yaml_says_so(tmp_path):
    with pytest.raises(InputError, match=re.escape("--set training.steps=[1: '[1' is not a YAML value (")):
        load_config(write(tmp_path, MINIMAL), ["training.steps=[1"])


def test_paths_in_a_file_are_relative_to_its_folder(tmp_path, monkeypatch, caplog):
    folder, elsewhere = tmp_path / "jobs", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    values = MINIMAL | {
        "student": {"model": "./student"}, "output": "out", "cache": {"path": "cache"},
        "data": {"train": {"path": "rows.jsonl"}, "evaluation": {"path": "/data/*.jsonl"}},
        "teachers": [{"model": "models/big"}, {"name": "hub", "model": "org/model"}],
    }  # fmt: skip
    path = write(folder, values)
    (folder / "models" / "big").mkdir(parents=True)
    config = load_config(os.path.relpath(path), ["data.train.rows=3"])
    assert config.student.model == str(folder / "student")
    assert config.data.train.path == str(folder / "rows.jsonl")
    assert config.data.evaluation.path == "/data/*.jsonl"
    assert [teacher.model for teacher in config.teachers] == [str(folder / "models" / "big"), "org/model"]
    assert (config.output, config.cache.path) == ("out", "cache")
    assert config.output_path == elsewhere / "out"
    assert load_config(path, ["data.train.path=rows.jsonl"]).data.train.path == "rows.jsonl"
    assert not caplog.records


def test_paths_in_the_current_folder_are_found_with_a_warning(tmp_path, monkeypatch, caplog):
    path = write(tmp_path / "jobs", MINIMAL)
    (tmp_path / "rows.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING):
        config = load_config(path)
    assert config.data.train.path == str(tmp_path / "rows.jsonl")
    (record,) = caplog.records
    assert "data.train.path 'rows.jsonl' is not in the config file's folder" in record.message
    assert "('../rows.jsonl')" in record.message


@pytest.mark.parametrize("folder", [".", "elsewhere"])
def test_an_override_does_not_change_the_section_of_an_alias(tmp_path, monkeypatch, folder):
    path = tmp_path / "run.yaml"
    path.write_text(
        "{student: {model: s}, method: {kind: supervised}, "
        "data: {train: &rows {path: /rows.jsonl, rows: 5}, evaluation: *rows}}"
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / folder)
    data = load_config(path, ["data.train.rows=9", "data.train.path=/other.jsonl"]).data
    assert (data.train.rows, data.train.path) == (9, "/other.jsonl")
    assert (data.evaluation.rows, data.evaluation.path) == (5, "/rows.jsonl")


def test_a_run_directory_stands_for_its_settings(tmp_path):
    write(tmp_path, MINIMAL).rename(tmp_path / "config.yaml")
    assert load_config(tmp_path) == load_config(tmp_path / "config.yaml")
    with pytest.raises(InputError, match="config.yaml' cannot be read: No such file"):
        load_config(tmp_path.parent)


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.train.path=other.jsonl", "teachers.0.model=other"],
        ["data.train={path: other.jsonl}", "teachers=[{model: first}]", "teachers.0.model=other"],
    ],
)
def test_a_replaced_path_gets_no_warning(tmp_path, monkeypatch, caplog, overrides):
    path = write(tmp_path / "jobs", MINIMAL | {"teachers": [{"model": "models/big"}]})
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "models" / "big").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = load_config(path, overrides)
    assert config.data.train.path == "other.jsonl"
    assert config.teachers[0].model == "other"
    assert not caplog.records


def test_workers_get_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "student").mkdir()
    values = MINIMAL | {
        "student": {"model": "student", "tokenizer": "~/tokenizer"}, "output": "out",
        "training": {"checkpoints": "s3://bucket/folder"}, "cache": {"path": "cache"},
        "synthesis": {"kind": "responses", "prompts": {"path": "../prompts.jsonl"}}, "data": {},
        "method": {"kind": "supervised"},
    }  # fmt: skip
    config = with_absolute_paths(parse_config(values))
    assert config.student.model == str(tmp_path / "student")
    assert config.student.tokenizer == os.path.expanduser("~/tokenizer")
    assert config.output == str(tmp_path / "out")
    assert config.cache.path == str(tmp_path / "cache")
    assert config.training.checkpoints == "s3://bucket/folder"
    assert config.synthesis.prompts.path == str(tmp_path.parent / "prompts.jsonl")
    assert config.teachers[0].model == "m"
    assert with_absolute_paths(config) == config


@pytest.mark.parametrize(
    ("changes", "place", "name"),
    [
        ({"student": {"model": "./nowhere"}}, "student.model", "nowhere"),
        ({"teachers": [{"model": "models/big/last"}]}, "teachers.0.model", "models/big/last"),
        ({"data": {"train": {"path": "rows.jsonl"}}}, "data.train.path", "rows.jsonl"),
        ({"data": {"train": {"path": "org/rows"}, "evaluation": {"path": "*.parquet"}}}, "data.evaluation.path",
         "*.parquet"),
    ],
)  # fmt: skip
def test_a_missing_input_is_named_with_its_setting_and_folder(tmp_path, monkeypatch, changes, place, name):
    monkeypatch.chdir(tmp_path)
    config = parse_config(MINIMAL | {"data": {"train": {"path": "org/rows"}}} | changes)
    with pytest.raises(InputError) as caught:
        check_inputs_exist(config)
    assert str(caught.value) == f"{place}: '{tmp_path}/{name}' does not exist; check the path."
    found = parse_config(MINIMAL | {"data": {"train": {"path": "missing.jsonl"}}})
    check_inputs_exist(found, training=False)


def test_the_model_of_an_endpoint_is_not_looked_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    endpoint = {"model": "accounts/provider/models/small", "engine": {"kind": "openai"}}
    values = MINIMAL | {"teachers": [endpoint], "method": {"kind": "supervised"}, "data": {"train": {"path": "org/a"}}}
    config = with_absolute_paths(parse_config(values))
    assert config.teachers[0].model == endpoint["model"]
    check_inputs_exist(config)


def test_an_unknown_users_home_is_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(write(tmp_path, MINIMAL), ["output=~nosuchuser/run"])
    assert config.output_path == tmp_path / "~nosuchuser" / "run"
