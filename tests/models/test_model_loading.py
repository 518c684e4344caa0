import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from rayk.errors import InputError
from rayk.models import (
    check_head,
    final_hidden,
    get_head,
    load_head,
    load_model,
    load_model_config,
    load_tokenizer,
    real_vocab_size,
    weights_fingerprint,
)
from tests.tiny import tiny_model, tiny_tokenizer

ARCHITECTURES = ["llama", "gpt2", "qwen2", "gemma2", "granite", "cohere"]


def probe(model, rows=3, length=11):
    ids = torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return ids, mask


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_body_and_head_equal_the_models_own_logits(architecture, tie):
    model = tiny_model(architecture=architecture, tie=tie, peaked=4.0)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tie
    ids, mask = probe(model)
    ours = get_head(model).logits(final_hidden(model, ids, mask)[mask.bool()])
    torch.testing.assert_close(
        ours, model(input_ids=ids, attention_mask=mask).logits[mask.bool()], atol=1e-5, rtol=1e-5
    )
    check_head(model)
    check_head(model.bfloat16())


@pytest.mark.parametrize(("architecture", "key"), [("granite", "logits_scaling"), ("cohere", "logit_scale")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("peaked", [0.02, 4.0], ids=["flat", "peaked"])
def test_a_scale_unknown_to_head_is_refused(architecture, key, dtype, peaked):
    model = tiny_model(architecture=architecture, peaked=peaked).to(dtype)
    own = getattr(model.config, key)
    model.logit_scale = own  # what Cohere's forward reads
    forward = type(model).forward

    def with_own_scale(*arguments, **options):
        setattr(model.config, key, own)
        try:
            return forward(model, *arguments, **options)
        finally:
            setattr(model.config, key, 1.5 * own)

    model.forward = with_own_scale
    setattr(model.config, key, 1.5 * own)
    with pytest.raises(InputError, match="does not implement"):
        check_head(model)


def test_a_softcap_unknown_to_head_is_refused():
    model = tiny_model(architecture="llama", peaked=4.0)
    forward = model.forward

    def capped(**inputs):
        output = forward(**inputs)
        output.logits = 5 * torch.tanh(output.logits / 5)
        return output

    check_head(model)
    model.forward = capped
    with pytest.raises(InputError, match="LlamaForCausalLM computes its logits in a way"):
        check_head(model)


def test_the_vocabulary_ends_with_the_tokenizers_highest_id():
    assert real_vocab_size(tiny_tokenizer(vocab_size=300)) == 300


def test_a_damaged_checkpoint_that_computes_nan_is_refused():
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(InputError, match="computes NaN"):
        check_head(model)


@pytest.fixture
def folder(tmp_path, tiny_teacher):
    shutil.copytree(tiny_teacher, tmp_path / "model")
    return tmp_path / "model"


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def refusal(load, name):
    with pytest.raises(InputError) as caught:
        load(str(name))
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert str(name) in sentence
    return sentence


def test_a_folder_loads_in_the_requested_dtype(folder):
    assert load_model(str(folder), dtype="bfloat16").dtype == torch.bfloat16
    assert load_model(str(folder)).dtype == torch.float32
    assert not load_model(str(folder)).training


@pytest.mark.parametrize("load", [load_model, load_tokenizer, load_model_config])
def test_a_missing_folder_is_one_sentence(load, tmp_path):
    assert "does not exist" in refusal(load, tmp_path / "none")


@pytest.mark.parametrize("load", [load_model, load_tokenizer, load_model_config])
def test_a_missing_relative_folder_is_mentioned_with_a_hub_id(load):
    assert "no such folder" in refusal(load, "models/nonesuch")


@pytest.mark.parametrize("load", [load_model, load_tokenizer, load_model_config])
def test_a_folder_without_a_model_is_one_sentence(load, tmp_path):
    refusal(load, tmp_path)


def test_a_corrupt_config_is_one_sentence(folder):
    (folder / "config.json").write_text("{not json")
    assert "config.json" in refusal(load_model, folder)
    refusal(load_model_config, folder)


def test_a_wrong_value_in_a_config_is_named(folder):
    change_config(folder, hidden_size="many")
    assert "hidden_size" in refusal(load_model, folder)


def test_an_unknown_architecture_is_named(folder):
    change_config(folder, model_type="nonesuch")
    assert "nonesuch" in refusal(load_model, folder)


def test_corrupt_weights_are_one_sentence(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1_000])
    refusal(load_model, folder)


def test_weights_of_another_shape_are_refused(folder):
    change_config(folder, intermediate_size=96)
    assert "mlp" in refusal(load_model, folder)


def test_missing_weights_are_not_left_random(folder):
    change_config(folder, num_hidden_layers=3)
    assert "model.layers.2" in refusal(load_model, folder)


def test_a_corrupt_tokenizer_is_one_sentence(folder):
    (folder / "tokenizer.json").write_text("{")
    refusal(load_tokenizer, folder)


def test_loading_prints_nothing(folder, capfd, monkeypatch):
    monkeypatch.setattr(transformers_logging, "_tqdm_active", True)  # the suite turns it off
    load_model(str(folder))
    load_tokenizer(str(folder))
    assert capfd.readouterr() == ("", "")


def test_tied_weights_are_not_reported_as_missing(tmp_path):
    tiny_model(tmp_path, tie=True)
    assert isinstance(load_model(str(tmp_path)), type(AutoModelForCausalLM.from_pretrained(tmp_path)))


def fingerprint_after(folder, change):
    """The fingerprint of a copy of `folder` whose weights `change` has altered."""
    copy = folder.with_name(f"{folder.name}-{change.__name__}")
    shutil.copytree(folder, copy)
    path = copy / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})
    return weights_fingerprint(str(copy))


@pytest.mark.parametrize("whole_bytes", [64 << 20, 4096], ids=["read-whole", "sampled"])
def test_the_fingerprint_depends_on_every_tensor_and_not_on_the_folder(tmp_path, monkeypatch, whole_bytes):
    monkeypatch.setattr("rayk.models.fingerprint.HASHED_WHOLE_BYTES", whole_bytes)
    tiny_model(tmp_path / "model", seed=1)
    own = weights_fingerprint(str(tmp_path / "model"))

    def nothing(weights):
        pass

    def one_norm(weights):
        weights["model.layers.1.input_layernorm.weight"][-1] += 1e-3

    def one_matrix(weights):
        weights["model.layers.0.mlp.up_proj.weight"] *= 1.001

    assert fingerprint_after(tmp_path / "model", nothing) == own
    assert len({own, *(fingerprint_after(tmp_path / "model", change) for change in (one_norm, one_matrix))}) == 3
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert weights_fingerprint(str(tmp_path / "model")) != own


def test_the_fingerprint_of_a_hub_model_is_its_commit():
    assert weights_fingerprint("nobody/nothing", "0123abcd") == "0123abcd"
    assert weights_fingerprint("nobody/nothing") == ""


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shard", ["5GB", "20KB"], ids=["whole", "sharded"])
def test_a_head_is_loaded_without_its_body(tmp_path, architecture, tie, shard):
    model = tiny_model(architecture=architecture, tie=tie, peaked=4.0)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    head, own = load_head(str(tmp_path), dtype=torch.float32), get_head(model)
    assert torch.equal(head.weight, own.weight)
    assert (head.bias, head.scale, head.softcap) == (None, own.scale, own.softcap)
    assert load_head(str(tmp_path), dtype=torch.bfloat16).weight.dtype == torch.bfloat16


def test_a_head_missing_in_the_safetensors_is_one_sentence(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"contain none of lm_head.weight.*use support 'topk' instead of 'hidden'"):
        load_head(str(tmp_path), dtype=torch.float32)
