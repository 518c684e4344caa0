"""Packed rows equal padded rows, or the body keeps its own attention."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rayk.models import final_hidden
from rayk.models.packing import can_pack, enable_packing

LENGTHS = [14, 3, 9, 1]
SIZE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PACKED = {
    "llama": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gemma3_text": {"sliding_window": 20},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "gpt_neox": {},
}
UNPACKED = {
    "bloom": {"n_layer": 2, "n_head": 4},  # positions come from the mask
    "qwen3_next": {"num_experts": 4, "num_experts_per_tok": 2},  # a recurrent state continues from row to row
}


def model_of(kind: str, **options):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZE | options)).eval()


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return torch.randint(3, SIZE["vocab_size"], mask.shape) * mask, mask


def hidden_and_gradients(model) -> tuple[torch.Tensor, list[torch.Tensor]]:
    ids, mask = rows()
    hidden = final_hidden(model, ids, mask)[mask.bool()]
    torch.manual_seed(2)
    model.zero_grad()
    (hidden * torch.randn_like(hidden)).sum().backward()
    return hidden.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", PACKED)
def test_packed_rows_equal_padded_rows(kind, checkpointing):
    model = model_of(kind, **PACKED[kind])
    hidden, gradients = hidden_and_gradients(model)

    enable_packing(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    assert can_pack(model, max(LENGTHS))
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, given, __: seen.append(given[0].numel()))
    packed_hidden, packed_gradients = hidden_and_gradients(model)
    hook.remove()

    assert seen == [sum(LENGTHS)]  # no padding was computed
    torch.testing.assert_close(packed_hidden, hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed_gradients, gradients, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", UNPACKED)
def test_a_body_that_mixes_tokens_outside_attention_stays_padded(kind):
    model = model_of(kind, **UNPACKED[kind])
    before = model.config._attn_implementation
    hidden, _ = hidden_and_gradients(model)

    enable_packing(model)

    assert not can_pack(model, 4) and model.config._attn_implementation == before
    torch.testing.assert_close(hidden_and_gradients(model)[0], hidden)


def test_rows_that_influence_each_other_are_detected(monkeypatch):
    monkeypatch.setattr("rayk.models.packing.mixes_by_attention_only", lambda config: True)
    model = model_of("qwen3_next", **UNPACKED["qwen3_next"])

    enable_packing(model)

    assert not can_pack(model, 4)


def test_rows_beyond_the_sliding_window_are_padded():
    model = model_of("gemma3_text", sliding_window=10, layer_types=["sliding_attention"] * 2)
    hidden, gradients = hidden_and_gradients(model)

    enable_packing(model)

    assert can_pack(model, 10) and not can_pack(model, 11)
    torch.testing.assert_close(hidden_and_gradients(model), (hidden, gradients))


def test_packing_does_not_change_generation():
    model = model_of("llama")
    ids, mask = rows()
    asked = {"input_ids": ids.flip(1), "attention_mask": mask.flip(1), "max_new_tokens": 8, "do_sample": False}
    before = model.generate(**asked)

    enable_packing(model)

    assert can_pack(model, 1)
    assert torch.equal(model.generate(**asked), before)


def test_a_saved_model_does_not_mention_packing(tmp_path):
    model = model_of("llama")
    enable_packing(model)

    model.save_pretrained(tmp_path)

    assert "packed" not in (tmp_path / "config.json").read_text()
