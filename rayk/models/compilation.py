"""Compile the layers of a transformers model for training with `torch.compile`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rayk.errors import InputError
from rayk.models.body import get_body
from rayk.models.packing import call_attention_uncompiled


def compile_layers(model: Any, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile each layer of the body in place; parameters keep their names.

    Layers share their compiled code, which accepts any number of tokens. The attention of packed rows stays outside of
    it, because it depends on the number of rows and on each row's length. Calls without gradients, such as generation
    with its growing cache, run the layers as they are.

    Args:
        backend: the compiler, as in `torch.compile`.

    Raises:
        InputError: the body has no list of layers, or no C++ compiler is installed for a model on a CPU.
    """
    body = get_body(model)
    layers = getattr(body, "layers", None) or getattr(body, "h", None)
    if not isinstance(layers, nn.ModuleList):
        raise InputError(
            f"training.compile: {type(model).__name__} has no list of layers that could be compiled; set it to false."
        )
    if model.device.type == "cpu" and backend == "inductor":
        _check_cpp_compiler()
    call_attention_uncompiled()
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)
        assert layer._compiled_call_impl is not None
        layer._compiled_call_impl = _with_gradients_only(layer._compiled_call_impl, layer._call_impl)


def _with_gradients_only(compiled: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else plain)(*args, **kwargs)

    return call


def _check_cpp_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise InputError("training.compile needs a C++ compiler on CPUs; install g++, or set it to false.") from error
