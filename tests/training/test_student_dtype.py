"""The types in which a student is trained and saved."""

import json

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from rayk.config import LoraConfig, StudentConfig, parse_config
from rayk.errors import InputError, RunFailed
from rayk.models.student import make_model
from rayk.run import distill
from rayk.training.optimizer import warmup_steps
from rayk.training.student import save_model
from tests.runs import config, curve, settings
from tests.tiny import perturb, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a student that was saved in bfloat16, with tied embeddings."""
    folder = tmp_path_factory.mktemp("models") / "bfloat16"
    tiny_model(seed=2, hidden=16, layers=1, tie=True).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer(folder)
    return str(folder)


def run_with(folder, checkpoint, student=None, **training):
    folder.mkdir()
    values = settings(folder, checkpoint, **training)
    values["student"] |= student or {}
    return distill(parse_config(values))


@pytest.mark.slow
def test_a_bfloat16_student_learns_as_with_bfloat16_computation(tmp_path, checkpoint):
    training = {"steps": 8, "learning_rate": 1e-3}
    student = run_with(tmp_path / "student", checkpoint, {"dtype": "bfloat16", "save_dtype": "float32"}, **training)
    computed = run_with(tmp_path / "computed", checkpoint, {"save_dtype": "float32"}, precision="bfloat16", **training)
    assert curve(student.output) == curve(computed.output)
    assert curve(student.output)[-1] < curve(student.output)[0] - 0.02


def test_small_updates_of_a_bfloat16_student_are_kept(tmp_path, checkpoint):
    student = {"dtype": "bfloat16", "save_dtype": "float32"}
    result = run_with(tmp_path / "run", checkpoint, student, steps=4, learning_rate=1e-6)
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (checkpoint, result.model))
    moved = [(after[name] != before[name].float()).float().mean() for name in before if "embed" not in name]
    assert min(moved) > 0.9
    assert all((after[name].bfloat16() == before[name]).float().mean() > 0.9 for name in before)


@pytest.mark.parametrize(
    ("student", "precision"),
    [
        ({}, "float32"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "bfloat16", "lora": {}}, "float32"),
        ({"dtype": "bfloat16", "lora": {"modules_to_save": ["lm_head"]}}, "bfloat16"),
    ],
)
def test_full_weights_in_bfloat16_are_computed_in_bfloat16(tmp_path, student, precision):
    values = settings(tmp_path, "student")
    values["student"] |= student
    assert parse_config(values).training.precision == precision


def test_trained_weights_are_float32_and_frozen_ones_as_loaded(checkpoint):
    whole = make_model(StudentConfig(model=checkpoint, dtype="bfloat16"), tiny_tokenizer(), 0)
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.float32}
    adapted = make_model(StudentConfig(model=checkpoint, dtype="bfloat16", lora=LoraConfig()), tiny_tokenizer(), 0)
    dtypes = {(parameter.requires_grad, parameter.dtype) for parameter in adapted.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


@pytest.mark.parametrize(
    ("save_dtype", "dtype"), [("auto", torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)]
)
def test_a_student_is_saved_in_the_type_of_its_checkpoint(tmp_path, checkpoint, save_dtype, dtype):
    result = run_with(tmp_path / "run", checkpoint, {"save_dtype": save_dtype}, steps=2)
    tensors = load_file(result.model / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert tensors.keys() == load_file(f"{checkpoint}/model.safetensors").keys(), "tied weights are saved once"
    assert AutoConfig.from_pretrained(result.model).dtype == dtype
    assert AutoModelForCausalLM.from_pretrained(result.model).dtype == dtype
    assert json.loads((result.model / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_a_saved_adapter_is_merged_before_its_weights_are_rounded(tmp_path, checkpoint):
    student = StudentConfig(model=checkpoint, lora=LoraConfig())
    model = perturb(make_model(student, tiny_tokenizer(), 0)).eval()
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        save_model(model, tiny_tokenizer(), tmp_path / "model", torch.bfloat16)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert loaded.dtype == torch.bfloat16
        np.testing.assert_allclose(loaded.float()(input_ids=ids).logits, expected, atol=0.1)


@pytest.mark.parametrize(
    ("method", "lora", "rate"),
    [
        ("supervised", None, 1e-4), ("logit_kd", None, 1e-4), ("on_policy", None, 1e-4), ("supervised", {}, 1e-4),
        ("preference", None, 1e-6), ("preference", {}, 1e-5), ("minillm", None, 5e-6), ("minillm", {}, 5e-5),
    ],
)  # fmt: skip
def test_each_method_has_its_own_learning_rate(tmp_path, method, lora, rate):
    values = settings(tmp_path, "student", method)
    values["student"]["lora"] = lora
    assert config(tmp_path, "student", method).training.learning_rate == 5e-3, "a given one is used"
    del values["training"]["learning_rate"]
    completed = parse_config(values)
    assert completed.training.learning_rate == rate
    assert yaml.safe_load(completed.to_yaml())["training"]["learning_rate"] == rate


@pytest.mark.parametrize(("method", "share"), [("supervised", 0.03), ("minillm", 0.03), ("preference", 0.1)])
def test_each_method_has_its_own_warmup(tmp_path, method, share):
    def completed(**training):
        values = settings(tmp_path, "student", method, **training)
        return parse_config(
            values | {"training": {k: v for k, v in values["training"].items() if v is not None}}
        ).training

    default, given = completed(warmup_steps=None), completed(warmup_steps=7)
    assert (default.warmup_share, warmup_steps(default, 200)) == (share, round(200 * share))
    assert (given.warmup_share, warmup_steps(given, 200)) == (None, 7)
    with pytest.raises(InputError, match="give 'warmup_steps' or 'warmup_share', not both"):
        completed(warmup_steps=7, warmup_share=0.5)


def test_a_model_that_would_not_load_is_not_saved(tmp_path):
    model = tiny_model(hidden=16, layers=1)
    model.model.layers[0].gate = torch.nn.Parameter(torch.ones(3))  # as if the architecture had renamed a tensor
    with pytest.raises(RunFailed, match=r"would not load: 1 of its tensors .* such as model.layers.0.gate"):
        save_model(model, tiny_tokenizer(), tmp_path / "model")
    assert not list(tmp_path.iterdir())
