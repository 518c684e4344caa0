"""The product of hidden states with a head, as float32 logits."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_float32(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return hidden · weightᵀ + bias in float32, [tokens, vocab]; differentiable.

    The factors are in the dtype of `hidden`, or in that of autocast if it is on. With half-precision factors, a GPU
    returns the float32 sums without rounding. On a CPU they are rounded to the factors' dtype, because kernels for
    half-precision factors with a float32 result do not exist there, and products of float32 factors take 2 to 4 times
    as long.

    Args:
        hidden: [tokens, width].
        weight: [vocab, width].
        bias: [vocab] or None.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(device))
    weight = weight.to(hidden.dtype)
    with torch.autocast(device, enabled=False):
        if not keeps_float32_sums(hidden):
            return F.linear(hidden, weight, None if bias is None else bias.to(hidden.dtype)).float()
        product = _Float32Product.apply(hidden, weight)
        return product if bias is None else product + bias.float()


def keeps_float32_sums(factor: Tensor) -> bool:
    """Return whether a product with `factor` can be returned in float32 although the factor is narrower."""
    return factor.device.type == "cuda" and factor.dtype in (torch.bfloat16, torch.float16)


class _Float32Product(torch.autograd.Function):
    """hidden · weightᵀ in float32; the gradients are computed in the dtype of the factors."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        grad = grad.to(hidden.dtype)
        return (
            grad @ weight if ctx.needs_input_grad[0] else None,
            grad.t() @ hidden if ctx.needs_input_grad[1] else None,
        )
