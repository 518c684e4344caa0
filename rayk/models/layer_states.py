"""The states of chosen layers of a causal LM: what each layer returns, before the final norm."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from rayk.errors import InputError
from rayk.models.body import long_rope_start
from rayk.models.head import final_hidden
from rayk.models.layers import find_layers
from rayk.models.types import CausalLM


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


def layer_states(
    model: CausalLM, input_ids: Tensor, attention_mask: Tensor, layers: Sequence[int]
) -> tuple[Tensor, list[Tensor]]:
    """Compute the hidden states after the final norm and those of `layers`, [rows, length, width] each, of right-padded
    rows. Only the chosen states are kept.

    Raises:
        InputError: the model has no list of its layers.
    """
    if not layers:
        return final_hidden(model, input_ids, attention_mask), []
    found = find_layers(model, model.config.get_text_config().num_hidden_layers)
    if found is None:
        raise InputError(f"{type(model).__name__} has no list of its layers, so their states cannot be taken.")
    states: dict[int, Tensor] = {}
    hooks = [
        found[2][layer].register_forward_hook(partial(_keep_output, states, layer)) for layer in sorted(set(layers))
    ]
    try:
        final = final_hidden(model, input_ids, attention_mask)
    finally:
        for hook in hooks:
            hook.remove()
    return final, [_unpacked(states[layer], attention_mask) for layer in layers]


def _keep_output(states: dict[int, Tensor], layer: int, _module: nn.Module, _inputs: Any, output: Any) -> None:
    states[layer] = output if isinstance(output, Tensor) else output[0]


def _unpacked(states: Tensor, attention_mask: Tensor) -> Tensor:
    """Return states [rows, length, width], with zeros at the padding if all rows were computed as one
    (`rayk.models.packing`)."""
    if states.shape[:2] == attention_mask.shape:
        return states
    padded = states.new_zeros(*attention_mask.shape, states.shape[-1])
    return padded.masked_scatter(attention_mask.bool()[:, :, None].to(states.device), states[0])
