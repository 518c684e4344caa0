"""Cut a student from a model: keep some of its layers, with the configuration that describes them.

As in Minitron's depth pruning (Muralidharan et al. 2024, arXiv 2407.14679, §2.2), embeddings, final norm and head stay
whole. The cut model must equal the one that transformers builds from the cut configuration, so that it can be saved and
loaded; otherwise it is refused.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rayk.errors import InputError
from rayk.models.body import get_body
from rayk.models.types import CausalLM

_PER_LAYER = (
    "layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "layer_rope_theta", "attention_layers",
    "num_key_value_heads_per_layer",
)  # fmt: skip
"""Fields with one value per layer."""
_LAYER_NUMBERS = ("mlp_only_layers", "moe_layers", "attn_layer_indices", "hybrid_layer_ids")
"""Fields with the numbers of some layers."""
_INDICES = ("layer_idx", "layer_id", "layer_number", "layer_index")
"""Attributes of modules that contain the layer's number, which is also its place in the KV cache."""


def choose_layers(layers: int | Sequence[int], count: int) -> list[int]:
    """Return the numbers of the layers to keep: `layers` itself, or that many, spread evenly, with first and last.

    Args:
        count: the number of layers of the whole model.

    Raises:
        InputError: the model has fewer layers.
    """
    if isinstance(layers, int):
        if layers > count:
            raise InputError(f"student.layers is {layers}, but student.model has only {count} layers; lower it.")
        return [round(place * (count - 1) / max(layers - 1, 1)) for place in range(layers)]
    if max(layers) >= count:
        raise InputError(
            f"student.layers names layer {max(layers)}, but student.model has only layers 0 to {count - 1}; name those."
        )
    return list(layers)


def cut_config(settings: Any, layers: int | Sequence[int]) -> tuple[Any, list[int]]:
    """Return a copy of a causal LM's configuration that describes the layers to keep, and the numbers of these layers.

    Raises:
        InputError: the model has fewer layers.
    """
    chosen = choose_layers(layers, settings.num_hidden_layers)
    settings = copy.deepcopy(settings)
    sparse_step = getattr(settings, "decoder_sparse_step", None)
    if sparse_step:  # Qwen's mixtures of experts: layer i is sparse if i + 1 is a multiple of this
        dense = {layer for layer in range(settings.num_hidden_layers) if (layer + 1) % sparse_step}
        settings.mlp_only_layers = sorted(dense | set(getattr(settings, "mlp_only_layers", None) or ()))
        settings.decoder_sparse_step = 1
    if getattr(settings, "first_k_dense_replace", None):  # DeepSeek: the first layers are dense
        settings.first_k_dense_replace = sum(layer < settings.first_k_dense_replace for layer in chosen)
    for name in _PER_LAYER:
        values = vars(settings).get(name)
        if isinstance(values, list | tuple) and len(values) == settings.num_hidden_layers:
            setattr(settings, name, [values[layer] for layer in chosen])
    for name in _LAYER_NUMBERS:
        if vars(settings).get(name):
            numbers = vars(settings)[name]
            setattr(settings, name, [place for place, layer in enumerate(chosen) if layer in numbers])
    settings.num_hidden_layers = len(chosen)
    return settings, chosen


def cut_model(model: CausalLM, layers: int | Sequence[int], name: str) -> None:
    """Keep only some layers of `model`, and change its configuration accordingly.

    Args:
        name: the model's name in error messages.

    Raises:
        InputError: the model has fewer layers, or no configuration describes the cut model.
    """
    settings, chosen = cut_config(model.config, layers)
    container, attribute, whole = _layer_list(model, model.config.num_hidden_layers, name)
    kept = nn.ModuleList(whole[layer] for layer in chosen)
    setattr(container, attribute, kept)
    with torch.device("meta"):
        described = type(model)._from_config(settings)
    described_layers = _layer_list(described, len(chosen), name)[2]
    for place, (layer, target) in enumerate(zip(kept, described_layers, strict=True)):
        _match(layer, target, f"{name}: its layer {chosen[place]} at place {place}")
    for key, value in vars(settings).items():  # in place, because the layers refer to this configuration
        setattr(model.config, key, value)
    expected = {key: tensor.shape for key, tensor in described.state_dict().items()}
    if expected != {key: tensor.shape for key, tensor in model.state_dict().items()}:
        raise InputError(f"student.layers cannot cut {name}: its configuration does not describe the cut model.")


def _layer_list(model: CausalLM, count: int, name: str) -> tuple[nn.Module, str, nn.ModuleList]:
    """Return the list of the model's layers, with the module and the attribute that contain it."""
    found = find_layers(model, count)
    if found is None:
        raise InputError(f"student.layers cannot cut {name}: {type(model).__name__} has no list of its layers.")
    return found


def find_layers(model: CausalLM, count: int) -> tuple[nn.Module, str, nn.ModuleList] | None:
    """Return the list of the model's `count` layers, with the module and the attribute that contain it; None if there
    is no such list."""
    body = get_body(model)
    lists = [
        (key.count("."), key)
        for key, module in body.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        return None
    parent, _, attribute = min(lists)[1].rpartition(".")
    container = body.get_submodule(parent)
    return container, attribute, getattr(container, attribute)


def _match(layer: nn.Module, target: nn.Module, where: str) -> None:
    """Number the modules of `layer` like those of `target`, and check that they are otherwise of the same kind.

    Raises:
        InputError: they are not.
    """
    modules, targets = dict(layer.named_modules()), dict(target.named_modules())
    different = next(iter(modules.keys() ^ targets.keys()), None)
    for key in modules.keys() & targets.keys():
        module, other = modules[key], targets[key]
        for attribute, value in vars(other).items():
            if attribute in _INDICES:
                setattr(module, attribute, value)
            elif attribute != "training" and isinstance(value, int | float | str | None):
                different = f"{key}.{attribute}" if vars(module).get(attribute) != value else different
    if different is not None:
        raise InputError(
            f"student.layers cannot cut {where} cannot be described by a configuration (it differs in "
            f"'{different}'); name other layers."
        )
