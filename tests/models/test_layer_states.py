"""The states of chosen layers equal those that transformers returns, packed, padded and with recomputed activations."""

import pytest
import torch

from rayk.errors import InputError
from rayk.models.layer_states import attention_widths, layer_numbers, layer_states
from rayk.models.packing import enable_packing
from tests.tiny import tiny_model

LENGTHS = [14, 3, 9]


def rows():
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return torch.randint(3, 384, mask.shape, generator=torch.Generator().manual_seed(1)) * mask, mask


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_states_are_the_outputs_of_the_layers(architecture, packed):
    model, (ids, mask) = tiny_model(architecture=architecture, layers=3), rows()
    if packed:
        enable_packing(model)
    expected = tiny_model(architecture=architecture, layers=3)(ids, attention_mask=mask, output_hidden_states=True)
    final, states = layer_states(model, ids, mask, [1, 0, 1])
    real = mask.bool()
    # transformers lists the embeddings first, and the last layer's output only after the final norm.
    for found, exact in zip((final, *states), [-1, 2, 1, 2], strict=True):
        torch.testing.assert_close(found[real], expected.hidden_states[exact][real], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen2"])
def test_attention_is_what_the_maps_return(architecture, packed):
    model, (ids, mask) = tiny_model(architecture=architecture, layers=2), rows()
    if packed:
        enable_packing(model)
    _, [first, second] = layer_states(model, ids, mask, [0, 1], "attention")
    maps, inputs = [layer.self_attn for layer in model.model.layers], []
    for each in maps:
        each.q_proj.register_forward_pre_hook(lambda _module, given: inputs.append(given[0]))
    layer_states(model, ids, mask, [0], "attention")
    real = mask.bool()
    for found, layer, given in zip((first, second), maps, list(inputs), strict=True):  # each map called adds one
        expected = torch.cat([layer.q_proj(given), layer.k_proj(given), layer.v_proj(given)], dim=-1)
        torch.testing.assert_close(found[real], expected[0] if packed else expected[real])
    assert first.shape[-1] == sum(attention_widths(model.config)) == 32 + 16 + 16


def test_a_model_without_separate_maps_has_no_attention():
    model, (ids, mask) = tiny_model(architecture="gpt2"), rows()
    with pytest.raises(InputError, match="GPT2LMHeadModel has no q_proj, k_proj, v_proj"):
        layer_states(model, ids, mask, [0], "attention")


def test_the_last_layer_is_taken_before_the_final_norm():
    model, (ids, mask) = tiny_model(layers=2), rows()
    final, [last] = layer_states(model, ids, mask, [1])
    torch.testing.assert_close(model.model.norm(last)[mask.bool()], final[mask.bool()])


@pytest.mark.parametrize("part", ["output", "attention"])
def test_gradients_flow_through_the_states_with_and_without_recomputed_activations(part):
    ids, mask = rows()
    gradients = []
    for recomputes in (False, True):
        model = tiny_model(layers=2).train()
        if recomputes:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        _, [state] = layer_states(model, ids, mask, [0], part)
        state[mask.bool()].square().sum().backward()
        gradients.append([None if p.grad is None else p.grad for p in model.parameters()])
    assert any(gradient is not None for gradient in gradients[0])
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


def test_layers_are_spread_evenly_up_to_the_last():
    settings = tiny_model(layers=12).config
    assert layer_numbers(6, settings, "it") == [1, 3, 5, 7, 9, 11]
    assert layer_numbers(5, settings, "it") == [1, 4, 6, 9, 11]
    assert layer_numbers(1, settings, "it") == [11]
    assert layer_numbers(12, settings, "it") == list(range(12))
    assert layer_numbers((3, 0), settings, "it") == [3, 0]


def test_missing_layers_are_refused():
    settings = tiny_model(layers=2).config
    with pytest.raises(InputError, match="3 layers are to be matched, but it has only 2"):
        layer_numbers(3, settings, "it")
    with pytest.raises(InputError, match="Layer 2 is to be matched, but it has only layers 0 to 1"):
        layer_numbers([0, 2], settings, "it")
