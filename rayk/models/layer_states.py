"""The states of chosen layers of a causal LM: what each layer returns, before the final norm, or what its attention
compares."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rayk.config.support import LayerPart
from rayk.errors import InputError
from rayk.models.body import long_rope_start
from rayk.models.head import final_hidden
from rayk.models.layers import find_layers
from rayk.models.types import CausalLM

_ATTENTION_MAPS = ("q_proj", "k_proj", "v_proj")


def layer_numbers(layers: int | Sequence[int], settings: Any, name: str) -> list[int]:
    """Return the numbers of the layers, from 0: `layers` itself, or that many, spread evenly up to the last one.

    With N of L layers these are every (L/N)-th, as in TED (arXiv 2210.01351, §4).

    Args:
        settings: the model's transformers configuration.
        name: the model's name in error messages.

    Raises:
        InputError: the model has fewer layers, or its layers have no states of their own.
    """
    if long_rope_start(settings) is not None:
        raise InputError(
            f"The states of layers cannot be taken from {name}, which computes short and long rows apart (rotary "
            "embeddings of type 'longrope'); use method 'logit_kd'."
        )
    count = settings.get_text_config().num_hidden_layers
    if isinstance(layers, int):
        if layers > count:
            raise InputError(f"{layers} layers are to be matched, but {name} has only {count}; lower method.layers.")
        return [round((place + 1) * count / layers) - 1 for place in range(layers)]
    if max(layers) >= count:
        raise InputError(
            f"Layer {max(layers)} is to be matched, but {name} has only layers 0 to {count - 1}; correct method.layers."
        )
    return list(layers)


def state_width(settings: Any) -> int:
    """Return the size of the states of a model with this transformers configuration."""
    return settings.get_text_config().hidden_size


def attention_widths(settings: Any) -> tuple[int, int, int]:
    """Return the sizes of the queries, keys and values of all heads in a model with this transformers configuration;
    zeros without attention."""
    text = settings.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if not isinstance(heads, int) or not heads:
        return 0, 0, 0
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    shared = getattr(text, "num_key_value_heads", None) or heads
    return size * heads, size * shared, size * shared


def layer_states(
    model: CausalLM, input_ids: Tensor, attention_mask: Tensor, layers: Sequence[int],
    part: LayerPart = "output",
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Compute the hidden states after the final norm and those of `layers`, [rows, length, width] each, of right-padded
    rows. Only the chosen states are kept.

    Args:
        part: the state of a layer: its output, or `attention`: its queries, keys and values, one after the other, as
            its linear maps return them. Their width is the sum of `attention_widths`.

    Raises:
        InputError: the model has no list of its layers, or with `attention` no such linear maps.
    """
    if not layers:
        return final_hidden(model, input_ids, attention_mask), []
    found = find_layers(model, model.config.get_text_config().num_hidden_layers)
    if found is None:
        raise InputError(f"{type(model).__name__} has no list of its layers, so their states cannot be taken.")
    sources = {
        layer: [found[2][layer]] if part == "output" else _attention_maps(found[2][layer], model)
        for layer in sorted(set(layers))
    }
    states: dict[nn.Module, Tensor] = {}
    hooks = [
        source.register_forward_hook(partial(_keep_output, states)) for each in sources.values() for source in each
    ]
    try:
        final = final_hidden(model, input_ids, attention_mask)
    finally:
        for hook in hooks:
            hook.remove()
    found_states = {layer: torch.cat([states[source] for source in each], dim=-1) for layer, each in sources.items()}
    if part == "attention":
        expected = sum(attention_widths(model.config))
        if wrong := [layer for layer, each in found_states.items() if each.shape[-1] != expected]:
            raise InputError(
                f"The queries, keys and values of layer {wrong[0]} of {type(model).__name__} have "
                f"{found_states[wrong[0]].shape[-1]} numbers, but its configuration says {expected}; choose another "
                "method.distance."
            )
    return final, [_unpacked(found_states[layer], attention_mask) for layer in layers]


def _attention_maps(layer: nn.Module, model: CausalLM) -> list[nn.Module]:
    """Return the linear maps of a layer that compute queries, keys and values."""
    modules = {name.rpartition(".")[2]: module for name, module in layer.named_modules()}
    found = [modules[name] for name in _ATTENTION_MAPS if name in modules]
    if len(found) < len(_ATTENTION_MAPS):
        raise InputError(
            f"A layer of {type(model).__name__} has no {', '.join(_ATTENTION_MAPS)}, so its queries, keys and values "
            "cannot be taken; choose another method.distance."
        )
    return found


def _keep_output(states: dict[nn.Module, Tensor], module: nn.Module, _inputs: Any, output: Any) -> None:
    states[module] = output if isinstance(output, Tensor) else output[0]


def _unpacked(states: Tensor, attention_mask: Tensor) -> Tensor:
    """Return states [rows, length, width], with zeros at the padding if all rows were computed as one
    (`rayk.models.packing`)."""
    if states.shape[:2] == attention_mask.shape:
        return states
    padded = states.new_zeros(*attention_mask.shape, states.shape[-1])
    return padded.masked_scatter(attention_mask.bool()[:, :, None].to(states.device), states[0])
