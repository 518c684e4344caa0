"""Models that cannot be loaded or trained are refused by name, from files and configurations alone."""

import json

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from rayk.config import StudentConfig
from rayk.errors import InputError
from rayk.models import load_model_config, load_tokenizer
from rayk.models.checks import check_student_model, check_teacher_model
from rayk.models.hub import hub_problem
from rayk.models.student import build_model_config, count_planned_parameters
from rayk.models.weight_files import check_weight_files
from tests.tiny import tiny_model, tiny_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4096\n"


@pytest.fixture
def folder(tmp_path):
    tiny_model(tmp_path / "model", tokenizer=tiny_tokenizer())
    return tmp_path / "model"


@pytest.fixture
def sharded(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, folder / file, {"format": "pt"})
    index = {"weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def test_complete_weights_are_accepted(folder, sharded):
    check_weight_files(str(sharded))
    check_weight_files("nobody/nothing")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "of the 2 weight files in .* do not exist"),
        (cut, "is cut off: it has .* bytes"),
        (lambda path: path.write_bytes(path.read_bytes()[:40]), "damaged or cut off"),
        (lambda path: path.write_bytes(b""), "damaged or cut off"),
        (lambda path: path.write_text(POINTER), "Git LFS pointer"),
        (lambda path: path.write_bytes(b"\x05\0\0\0\0\0\0\0[1,2]"), "not a safetensors file"),
    ],
    ids=["missing", "cut", "header", "empty", "pointer", "other"],
)
def test_a_damaged_shard_is_named(sharded, damage, said):
    damage(sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(InputError, match=f"model-00002-of-00002.safetensors.*{said}"):
        check_weight_files(str(sharded))


def test_a_single_damaged_file_is_named(folder):
    cut(folder / "model.safetensors")
    with pytest.raises(InputError, match="model.safetensors is cut off"):
        check_weight_files(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="contains no weights"):
        check_weight_files(str(folder))
    (folder / "model.safetensors.index.json").write_text(POINTER)
    with pytest.raises(InputError, match=r"index.json is a Git LFS pointer"):
        check_weight_files(str(folder))


@pytest.mark.parametrize("model_type", ["t5", "vit"])
def test_models_of_another_kind_are_refused_in_one_sentence(tmp_path, model_type):
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"is a {model_type}, not a causal language model") as caught:
        count_planned_parameters(StudentConfig(model=str(tmp_path)), tiny_tokenizer())
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_a_quantized_student_is_refused_and_a_teacher_if_it_cannot_be_loaded(folder):
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "no_such_method"}
    (folder / "config.json").write_text(json.dumps(settings))
    config = load_model_config(str(folder))
    with pytest.raises(InputError, match=r"quantized \(no_such_method\).*cannot be trained"):
        check_student_model(config, str(folder))
    with pytest.raises(InputError, match="Teacher 't' .*quantized .no_such_method.*cannot load it here"):
        check_teacher_model(config, str(folder), "Teacher 't'")


def test_a_gguf_file_and_a_models_own_code_are_explained(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match="GGUF files cannot be"):
        load_tokenizer(str(tmp_path / "model.gguf"))
    own = {"model_type": "mine", "auto_map": {"AutoConfig": "configuration.Mine", "AutoModelForCausalLM": "m.Mine"}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    with pytest.raises(InputError, match="set trust_remote_code: true"):
        load_model_config(str(tmp_path))


def test_an_unreachable_hub_is_told_in_one_sentence(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the port of the discard service, closed
    hub_problem.cache_clear()
    try:
        with pytest.raises(InputError, match=r"no such folder, http://127.0.0.1:9 cannot be reached .*local cache"):
            load_tokenizer("nobody/nothing")
    finally:
        hub_problem.cache_clear()


def test_a_student_with_a_config_of_its_own_is_checked_too():
    with pytest.raises(InputError, match=r"student.config.*not a causal language model"):
        build_model_config(StudentConfig(config={"model_type": "t5"}), tiny_tokenizer())
