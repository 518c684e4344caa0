"""Size of what the body's forward pass keeps for the backward pass, found without memory and without weights.

PyTorch's fake tensors compute shapes and types but no values, so the real forward pass of any architecture tells which
tensors it would keep, in seconds and for any number of tokens.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rayk.models.body import get_body
from rayk.models.types import DTYPES

_NAME = "rayk_without_mask"


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward pass of the body keeps for the backward pass.

    Attributes:
        tensors: results of the layers, which grow with the tokens.
        weight_copies: copies of weights in the type of the computation (autocast), which do not.
        layer: the part of `tensors` of one layer.
        inputs: the inputs of all layers, which recomputation of activations keeps instead of `tensors`.
    """

    tensors: int
    weight_copies: int
    layer: int
    inputs: int


def measure_activations(model: Any, rows: int, length: int, precision: str) -> Activations:
    """Return what the body of `model` keeps of `rows` rows of `length` tokens.

    Args:
        model: a causal LM on the device "meta"; its parameters are replaced by fake ones.
        precision: a key of `DTYPES`; another type than that of the weights is autocast.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    _use_attention_without_mask(model)
    config = model.config.get_text_config()
    dtype = DTYPES[precision]
    with _no_log_of_fake_tensors(), FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        shapes = {tuple(p.shape[i] for i in order) for p in model.parameters() for order in _orders(p.ndim)}
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            if (key := tensor.untyped_storage()._cdata) not in parameters:
                kept[key] = tensor
            return tensor

        with (
            torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            states = get_body(model.train())(
                input_ids=torch.zeros(rows, length, dtype=torch.long),
                position_ids=torch.arange(length)[None],
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.long),
                use_cache=False,
            ).last_hidden_state
        # A weight's copy has the shape of the weight; results have the shapes of `rows` and `length`.
        grows = {length, rows * length}
        copies = [t for t in kept.values() if tuple(t.shape) in shapes and not grows & set(t.shape)]
        total, weights = _bytes(kept.values()), _bytes(copies)
        layers = config.num_hidden_layers
        return Activations(
            total - weights, weights, (total - weights) // layers, layers * states.numel() * states.element_size()
        )


@contextmanager
def _no_log_of_fake_tensors() -> Iterator[None]:
    """Suppress the traceback that torch logs before it raises the error of an operation without a fake result."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _orders(dimensions: int) -> list[Sequence[int]]:
    return [range(dimensions), range(dimensions)[::-1]]


def _use_attention_without_mask(model: Any) -> None:
    """Let `model` compute `sdpa` as packed rows do, without a mask; other implementations stay as they are."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        return sdpa_attention_forward(module, query, key, value, None, **options)

    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(_NAME, attention)
        AttentionMaskInterface.register(_NAME, sdpa_mask)
        model.set_attn_implementation(_NAME)
