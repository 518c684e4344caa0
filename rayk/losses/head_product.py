"""The product of hidden states with the student's head, one chunk of positions at a time, and its gradients."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rayk.errors import InputError
from rayk.losses.precision import compute_dtype
from rayk.models import Head
from rayk.models.product import keeps_float32_sums, linear_float32

CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
"""Size of a chunk of float32 logits by type of device."""
KEPT_BYTES = {"cpu": 256 << 20, "cuda": 256 << 20}
"""Up to this size, results of the first chunks are stored for the backward pass, which then does not compute the logits
of these chunks again."""


@dataclass(frozen=True)
class ChunkPlan:
    """How the logits are computed.

    Attributes:
        scale, softcap: as in `Head`.
        chunk_tokens: positions in a chunk.
        product_dtype: dtype of the product with the head.
        kept_bytes: memory for results that are stored for the backward pass; 0 if nothing requires gradients.
    """

    scale: float
    softcap: float | None
    chunk_tokens: int
    product_dtype: torch.dtype
    kept_bytes: int

    @classmethod
    def of(cls, hidden: Tensor, head: Head, chunk_tokens: int | None = None) -> "ChunkPlan":
        """Return the plan for hidden states [tokens, width].

        Args:
            chunk_tokens: by default a float32 chunk takes about 32 MB (CPU) or 256 MB (GPU).

        Raises:
            InputError: `chunk_tokens` is not positive.
        """
        learns = any(part is not None and part.requires_grad for part in (hidden, head.weight, head.bias))
        return cls(
            scale=head.scale,
            softcap=head.softcap,
            chunk_tokens=chunk_size(hidden, head, chunk_tokens),
            product_dtype=_product_dtype(hidden),
            kept_bytes=KEPT_BYTES.get(hidden.device.type, 0) if learns and torch.is_grad_enabled() else 0,
        )

    def chunks(self, tokens: int) -> list[slice]:
        """Return the chunks of `tokens` positions, at least one."""
        return [slice(start, start + self.chunk_tokens) for start in range(0, max(tokens, 1), self.chunk_tokens)]


class HeadProduct:
    """The product with the head: weights cast once to the dtype of the product, and memory reused by every chunk.

    On a CPU, the page faults of allocating memory for each chunk cost more time than the arithmetic.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, plan: ChunkPlan) -> None:
        self.plan = plan
        self.weight = weight.detach().to(plan.product_dtype)
        self.bias = None if bias is None else bias.detach().to(plan.product_dtype)

    def scores(self, hidden: Tensor, keep: bool = False) -> tuple[Tensor, Tensor]:
        """Return memory for a chunk in `product_dtype` (newly allocated if `keep`), and the logits in at least float32,
        which may share this memory."""
        memory = self._empty(len(hidden), self.plan.product_dtype) if keep else self._narrow[: len(hidden)]
        hidden = hidden.detach().to(self.plan.product_dtype)
        if keeps_float32_sums(hidden):
            logits = linear_float32(hidden, self.weight, self.bias)
        else:
            if self.bias is None:
                torch.mm(hidden, self.weight.t(), out=memory)
            else:
                torch.addmm(self.bias, hidden, self.weight.t(), out=memory)
            logits = self.widen(memory)
        if self.plan.scale != 1.0:
            logits.mul_(self.plan.scale)
        if self.plan.softcap is not None:
            logits.div_(self.plan.softcap).tanh_().mul_(self.plan.softcap)
        return memory, logits

    def before_scaling(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Return the gradient with respect to W h + b, given that with respect to the logits [tokens, vocab]."""
        if self.plan.softcap is not None:
            grad = grad * (1 - (logits / self.plan.softcap).square())
        return grad if self.plan.scale == 1.0 else grad * self.plan.scale

    def widen(self, memory: Tensor) -> Tensor:
        """Return `memory` itself, or a float32 copy that the next call overwrites."""
        return memory if memory.dtype == compute_dtype(memory.dtype) else self._wide[: len(memory)].copy_(memory)

    def narrow(self, values: Tensor, memory: Tensor) -> Tensor:
        """Write `values` into `memory`, in the dtype of the product."""
        return memory if values.dtype == memory.dtype else memory.copy_(values)

    @cached_property
    def _narrow(self) -> Tensor:
        return self._empty(self.plan.chunk_tokens, self.plan.product_dtype)

    @cached_property
    def _wide(self) -> Tensor:
        return self._empty(self.plan.chunk_tokens, torch.float32)

    def _empty(self, tokens: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(tokens, len(self.weight), dtype=dtype, device=self.weight.device)


class HeadGradients:
    """Gradients of hidden states, weight and bias, if required; those of weight and bias are summed in float32."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, ...]) -> None:
        self.inputs, self.wanted = (hidden, weight, bias), wanted
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def add(self, chunk: slice, grad: Tensor, weight: Tensor, factors: Tensor | None = None) -> None:
        """Add the gradients of a chunk, given the gradient of the loss with respect to W h + b, [tokens, vocab].

        Args:
            factors: [tokens]; if given, they multiply the rows of `grad`.
        """
        hidden, wide = self.inputs[0], compute_dtype(grad.dtype)
        column = None if factors is None else factors.to(grad.dtype)[:, None]
        if self.hidden is not None:
            states = grad @ weight
            self.hidden[chunk] = states if column is None else states.mul_(column)
        if self.wanted[1]:
            states = hidden[chunk].to(grad.dtype)
            states = states if column is None else states * column
            if self.weight is None:
                self._part = grad.t() @ states
                self.weight = self._part.to(wide)
            elif grad.dtype == wide:
                self.weight.addmm_(grad.t(), states)
            else:
                self.weight += torch.mm(grad.t(), states, out=self._part)
        if self.wanted[2]:
            bias = grad.sum(dim=0, dtype=wide) if column is None else (grad.t() @ column)[:, 0].to(wide)
            self.bias = bias if self.bias is None else self.bias.add_(bias)

    def final_weight(self) -> Tensor | None:
        return self._final(self.weight, 1)

    def final_bias(self) -> Tensor | None:
        return self._final(self.bias, 2)

    def _final(self, total: Tensor | None, place: int) -> Tensor | None:
        if not self.wanted[place]:
            return None
        owner = self.inputs[place]
        assert owner is not None
        return torch.zeros_like(owner) if total is None else total.to(owner.dtype)


def chunk_size(hidden: Tensor, head: Head, chunk_tokens: int | None) -> int:
    """Return the number of positions in a chunk: as given, or chosen by the size of a float32 chunk of logits.

    Raises:
        InputError: `chunk_tokens` is not positive.
    """
    if chunk_tokens is None:
        chunk_tokens = max(16, CHUNK_BYTES.get(hidden.device.type, 32 << 20) // (4 * head.vocab_size))
    if chunk_tokens < 1:
        raise InputError(f"chunk_tokens is {chunk_tokens}; give a number of positions, at least 1.")
    return min(chunk_tokens, max(len(hidden), 1))


def _product_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype
