"""An untrained adapter changes nothing, only the adapter is trained, and it merges into the base."""

import copy
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rayk.config import LoraConfig, StudentConfig, parse_config
from rayk.errors import InputError
from rayk.models import check_head, final_hidden, get_head, load_model
from rayk.models.lora import add_adapter, merged_state_dict
from rayk.models.student import ParameterCount, count_parameters, count_planned_parameters, make_model
from rayk.serving.weights import trainable_state_dict
from rayk.training.student import save_model
from tests.tiny import perturb, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
IDS = torch.arange(3, 27).reshape(3, 8)
MASK = (torch.arange(8) < torch.tensor([[5], [8], [2]])).long()
KINDS = [
    {"architecture": "llama"}, {"architecture": "llama", "tie": True}, {"architecture": "gpt2", "tie": True},
    {"architecture": "qwen2"}, {"architecture": "gemma2", "tie": True}, {"architecture": "cohere"},
]  # fmt: skip
A_NAME = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
WHOLE = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head", "norm"]}


def student_of(folder, seed=0, lora=None, dtype="float32", gradient_checkpointing=False, **model):
    if not folder.exists():
        tiny_model(folder, seed=1, hidden=16, layers=2, tokenizer=TOKENIZER, **model)
    config = StudentConfig(
        model=str(folder), lora={"r": 4, "alpha": 8} | (lora or {}), dtype=dtype,
        gradient_checkpointing=gradient_checkpointing,
    )  # fmt: skip
    return make_model(config, TOKENIZER, seed)


def logits(model):
    return get_head(model).logits(final_hidden(model, IDS, MASK)[MASK.bool()])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_untrained_student_equals_its_base(kind, dtype, tmp_path):
    model = student_of(tmp_path / "base", dtype=dtype, **kind).eval()
    assert torch.equal(logits(model), logits(load_model(str(tmp_path / "base"), dtype=dtype)))
    learning = {name: each.dtype for name, each in model.named_parameters() if each.requires_grad}
    assert learning and all(".lora_" in name for name in learning)
    assert set(learning.values()) == {torch.float32}
    assert {each.dtype for name, each in model.named_parameters() if name not in learning} == {getattr(torch, dtype)}


def test_only_the_adapter_gets_gradients(tmp_path):
    model = perturb(student_of(tmp_path / "base")).train()
    logits(model).logsumexp(1).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".lora_" in name), name
        assert parameter.grad is None or parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(("kind", "lora"), [*((kind, {}) for kind in KINDS), ({}, WHOLE)], ids=str)
def test_merged_and_adapted_models_compute_the_same(kind, lora, tmp_path):
    model = perturb(student_of(tmp_path / "base", lora=lora, **kind)).eval()
    before = copy.deepcopy(model.state_dict())
    save_model(model, TOKENIZER, tmp_path / "model")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        expected = model(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()]
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        untrained = base(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()]
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        for each in (plain, adapted):
            got = each(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()]
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
        assert (expected - untrained).abs().max() > 0.05  # so that the comparison is meaningful
        check_head(model)
    assert merged_state_dict(model).keys() == load_model(str(tmp_path / "base")).state_dict().keys()


def test_a_bfloat16_base_is_merged_in_bfloat16(tmp_path):
    model = perturb(student_of(tmp_path / "base", dtype="bfloat16")).eval()
    save_model(model, TOKENIZER, tmp_path / "model")
    plain = load_model(str(tmp_path / "model"))
    assert plain.dtype == torch.bfloat16
    torch.testing.assert_close(logits(plain), logits(model), atol=0.1, rtol=0.05)


def test_the_adapter_depends_only_on_the_seed(tmp_path):
    first = student_of(tmp_path / "base", seed=7)
    torch.rand(3)
    state = torch.get_rng_state()
    again, other = student_of(tmp_path / "base", seed=7), student_of(tmp_path / "base", seed=8)
    assert torch.equal(torch.get_rng_state(), state)
    same = {name: torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items()}
    assert all(same.values())
    assert not torch.equal(first.get_parameter(A_NAME), other.get_parameter(A_NAME))


def test_packed_and_checkpointed_gradients_equal_padded_ones(tmp_path):
    plain = perturb(student_of(tmp_path / "base"))
    assert plain.config._attn_implementation == "rayk_packed"
    saving = perturb(student_of(tmp_path / "base", gradient_checkpointing=True))
    padded = perturb(student_of(tmp_path / "base"))
    padded.set_attn_implementation("sdpa")
    gradients = []
    for model in (plain, saving, padded):
        logits(model.train()).logsumexp(1).sum().backward()
        gradients.append({name: each.grad for name, each in model.named_parameters() if each.requires_grad})
    for other in gradients[1:]:
        for name, expected in gradients[0].items():
            torch.testing.assert_close(other[name], expected, atol=1e-4, rtol=1e-3)


def test_dropout_applies_only_in_training(tmp_path):
    model, dry = (perturb(student_of(tmp_path / "base", lora={"dropout": rate})) for rate in (0.5, 0.0))
    assert torch.equal(logits(model.eval()), logits(dry.eval()))
    assert not torch.equal(logits(model.train()), logits(dry.train()))


def test_parameters_are_counted_without_loading_weights(tmp_path):
    model = student_of(tmp_path / "base", tie=True)
    config = StudentConfig(model=str(tmp_path / "base"), lora={"r": 4})
    adapters = 2 * 4 * (4 * 16 + 16 + 8 + 8 + 16 + 2 * (16 + 32) + 32 + 16)
    base = count_parameters(load_model(str(tmp_path / "base"))).total
    assert (
        count_planned_parameters(config, TOKENIZER)
        == count_parameters(model)
        == ParameterCount(adapters, base + adapters)
    )
    assert str(count_parameters(model)).endswith(f"parameters ({adapters / (base + adapters):.2%})")
    assert count_planned_parameters(StudentConfig(model=str(tmp_path / "base")), TOKENIZER) == ParameterCount(
        base, base
    )


def test_only_the_adapter_is_trainable_state(tmp_path):
    model = student_of(tmp_path / "base", lora=WHOLE)
    names = {name for name, each in model.named_parameters() if each.requires_grad}
    assert trainable_state_dict(model).keys() == names
    assert {name.split(".")[-3] for name in names} == {"lora_A", "lora_B", "modules_to_save"}


@pytest.mark.parametrize(
    ("lora", "tie", "said"),
    [
        ({"target_modules": ["q_prof"]}, False, "target_modules names 'q_prof', which LlamaForCausalLM lacks; it has"),
        ({"target_modules": ["q_proj", "nothing"]}, False, "names 'nothing', which"),
        ({"modules_to_save": ["score"]}, False, "modules_to_save names 'score', which"),
        ({"target_modules": ["mlp"]}, False, "contains other modules; name those"),
        ({"target_modules": ["lm_head"]}, False, "the student's head; name it in student.lora.modules_to_save"),
        ({"target_modules": ["embed_tokens"]}, True, "embeddings and head are one tensor"),
        ({"modules_to_save": ["lm_head"]}, True, "embeddings and head are one tensor"),
        ({"target_modules": ["input_layernorm"]}, False, "student.lora cannot be added to LlamaForCausalLM: Target"),
    ],
)
def test_modules_that_cannot_be_adapted_are_named(lora, tie, said):
    with pytest.raises(InputError, match=said):
        add_adapter(tiny_model(tie=tie), LoraConfig(**lora), 0, "base")


@pytest.mark.parametrize(
    ("student", "said"),
    [
        ({"model": "m", "lora": {"r": 0}}, r"student.lora.r: .*greater than or equal to 1"),
        ({"model": "m", "lora": {"dropout": 1.0}}, r"student.lora.dropout: .*less than 1"),
        ({"model": "m", "lora": {"alpha": 0}}, r"student.lora.alpha: .*greater than 0"),
        ({"model": "m", "lora": {"target_modules": []}}, r"student.lora.target_modules is \[\]; it may be"),
        ({"model": "m", "lora": {"target_modules": "q_proj"}}, r"student.lora.target_modules is 'q_proj'; it may be"),
        ({"model": "m", "lora": {"target_module": ["q_proj"]}}, r"student.lora.*did you mean 'target_modules'"),
        (
            {"model": "m", "lora": {"target_modules": ["q_proj"], "modules_to_save": ["q_proj"]}},
            "'q_proj' is in both target_modules and modules_to_save",
        ),
        ({"config": {"model_type": "llama"}, "lora": {}}, "'lora' adapts trained weights"),
    ],
)
def test_settings_that_do_not_fit_are_refused(student, said):
    with pytest.raises(InputError, match=said):
        parse_config({"student": student, "data": {"train": {"path": "rows"}}, "method": {"kind": "supervised"}})


def test_a_missing_peft_names_the_package_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"pip install 'rayk\[lora\]'"):
        add_adapter(tiny_model(), LoraConfig(), 0, "base")
