"""The linear layers of a model that an adapter can change exactly.

Some layers cannot have a pair (A, B) of their own: those whose weights a kernel reads without calling the layer, and
those whose names peft takes for the experts of a mixture, which transformers stores as one tensor per layer.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

_READ_BY_KERNEL = ("x_proj", "dt_proj", "out_proj")
"""Linear layers of a Mamba mixer whose weights its kernels read directly."""


def adaptable_layers(model: Any) -> list[str]:
    """Return the full names of the linear layers for `all-linear`."""
    from transformers.pytorch_utils import Conv1D

    head, renamed = model.get_output_embeddings(), _names_of_experts(model)
    read_by_kernel = set(_layers_read_by_kernel(model))
    # Subclasses, such as Llama 4's routers, return other values than a linear layer.
    return [
        name
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D)
        and module is not head
        and name not in read_by_kernel
        and name.rpartition(".")[2] not in renamed
    ]


def unsuitable_reason(model: Any, name: str) -> str | None:
    """Return why the layers `name` (a full name or its last part) cannot be adapted exactly; None if they can."""
    if name.rpartition(".")[2] in _names_of_experts(model):
        return "which peft applies to the experts of a mixture; experts cannot be adapted"
    if any(layer == name or layer.endswith(f".{name}") for layer in _layers_read_by_kernel(model)):
        return "whose weights a Mamba kernel reads directly; it cannot be adapted"
    return None


def _layers_read_by_kernel(model: Any) -> Iterator[str]:
    for name, module in model.named_modules():
        if isinstance(getattr(module, "A_log", None), nn.Parameter) and hasattr(module, "D"):
            yield from (f"{name}.{child}" for child in _READ_BY_KERNEL if hasattr(module, child))


def _names_of_experts(model: Any) -> set[str]:
    """Return the last parts of names that peft replaces by parameters of experts."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    names = set()
    for name in {name.rpartition(".")[2] for name, _ in model.named_modules() if name}:
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model=model, conversions=None)
        except ValueError:  # a part of a fused parameter
            names.add(name)
        if config.target_parameters:
            names.add(name)
    return names
