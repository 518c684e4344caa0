"""Checkpoints that are no plain causal LM: their text model is loaded alone, or they are refused by name."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from rayk.config import StudentConfig
from rayk.errors import InputError
from rayk.models import get_head, load_head, load_model, load_model_config
from rayk.models.student import build_model_config, count_parameters, count_planned_parameters, make_model
from rayk.models.text_model import causal_config
from rayk.training.student import save_model
from tests.architectures import VISION_LANGUAGE, make_architecture, make_vision_language
from tests.tiny import perturb, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
IDS = torch.arange(6, 30)[None]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", VISION_LANGUAGE)
def test_the_text_model_of_a_vision_language_checkpoint_is_trained_and_saved_alone(kind, tmp_path):
    whole = make_vision_language(kind)
    whole.save_pretrained(tmp_path / "whole")
    config = StudentConfig(model=str(tmp_path / "whole"))
    student = make_model(config, TOKENIZER, seed=0)
    torch.testing.assert_close(logits(student), logits(whole), atol=1e-5, rtol=1e-5)
    assert not any("vision" in name or "visual" in name for name, _ in student.named_parameters())
    assert count_planned_parameters(config, TOKENIZER) == count_parameters(student)
    assert torch.equal(load_head(config.model, dtype=torch.float32).weight, get_head(student).weight)

    perturb(student)
    save_model(student, TOKENIZER, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(loaded), logits(student), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_the_text_model_of_a_vision_language_checkpoint_can_be_cut(kind, tmp_path):
    make_vision_language(kind).save_pretrained(tmp_path / "whole")
    config = StudentConfig(model=str(tmp_path / "whole"), layers=2, lora={"r": 2})
    student = perturb(make_model(config, TOKENIZER, seed=0)).eval()
    save_model(student, TOKENIZER, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(loaded), logits(student), atol=1e-4, rtol=1e-4)
    assert loaded.config.num_hidden_layers == 2
    assert not (tmp_path / "adapter").exists()


def test_a_text_model_that_computes_otherwise_is_refused(tmp_path, monkeypatch):
    make_vision_language("qwen2_5_vl").save_pretrained(tmp_path)
    monkeypatch.setattr("rayk.models.text_model._PLAIN_TYPES", {"qwen2_5_vl_text": "mistral"})
    with pytest.raises(InputError, match="Qwen2_5_VLForConditionalGeneration, and its text model cannot be"):
        load_model(str(tmp_path))


SMALL = {"vocab_size": 384, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("t5", {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}, "but an encoder-decoder"),
        ("bert", {"intermediate_size": 16}, "but an encoder, whose tokens see later ones"),
        ("gemma3_text", {"use_bidirectional_attention": True, "intermediate_size": 16}, "but an encoder, whose tokens"),
        ("vit", {"intermediate_size": 16}, "not a causal language model"),
    ],
)
def test_models_that_are_no_causal_language_models_are_refused_by_name(kind, changes, said, tmp_path):
    AutoModel.from_config(AutoConfig.for_model(kind, **SMALL | changes)).save_pretrained(tmp_path)
    for refuse in (
        lambda: load_model(str(tmp_path)),
        lambda: build_model_config(StudentConfig(model=str(tmp_path)), TOKENIZER),
        lambda: causal_config(load_model_config(str(tmp_path)), str(tmp_path)),
    ):
        with pytest.raises(InputError) as caught:
            refuse()
        assert said in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_soft_cap_on_attention_scores_is_kept(tmp_path):
    make_architecture("gemma2").save_pretrained(tmp_path)
    exact = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    without = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert (logits(exact) - logits(without)).abs().max() > 0.1  # so that the comparison is meaningful
    random = StudentConfig(config=exact.config.to_dict() | {"sliding_window": 5})
    for model in (load_model(str(tmp_path)), make_model(StudentConfig(model=str(tmp_path)), TOKENIZER, seed=0)):
        torch.testing.assert_close(logits(model), logits(exact), atol=1e-5, rtol=1e-5)
    assert make_model(random, TOKENIZER, seed=0).config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("attention", "said"), [("sdpa", "attention is 'sdpa', which ignores this model's soft-cap"), ("fast", "'fast'")]
)
def test_an_attention_that_cannot_be_used_is_refused(attention, said, tmp_path):
    make_architecture("gemma2").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=said):
        count_planned_parameters(StudentConfig(model=str(tmp_path), attention=attention), TOKENIZER)


def test_the_named_attention_is_used(tmp_path):
    make_architecture("llama").save_pretrained(tmp_path)
    config = StudentConfig(model=str(tmp_path), attention="eager")
    assert make_model(config, TOKENIZER, seed=0).config._attn_implementation == "eager"
