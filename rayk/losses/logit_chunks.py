"""Losses that need all logits of a position, computed from hidden states one chunk of positions at a time.

The gradient of such a loss with respect to the logits of a position does not depend on other positions. So it is
computed together with the loss, while the chunk's logits exist, and the backward pass multiplies it by the incoming
gradient. At most `KEPT_BYTES` of gradients are stored; the chunks after them are computed again.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rayk.losses.head_product import ChunkPlan, HeadGradients, HeadProduct
from rayk.models import Head
from rayk.signals.batch import SignalBatch

ChunkLoss = Callable[..., tuple[tuple[Tensor, ...], dict[str, Tensor]]]
"""(logits, teacher, targets) -> (losses, terms) at the positions of a chunk, [tokens] each."""


def map_logits(
    function: ChunkLoss, hidden: Tensor, head: Head, teacher: Tensor | SignalBatch, targets: Tensor | None,
    chunk_tokens: int | None = None, *, store: bool = True,
) -> tuple[list[Tensor], dict[str, Tensor]]:  # fmt: skip
    """Return the results of `function`, which is called for one chunk of positions at a time.

    Args:
        function: returns losses, differentiable in the logits, and terms without gradient. Its results at a position
            must depend on that position only. The logits are at least float32.
        hidden: the student's states at the counted positions, [tokens, width].
        head: the student's head.
        chunk_tokens: positions in a chunk; by default chosen from the vocabulary size of `head`.
        store: whether to store gradients of the first loss. They serve only if the others receive no gradient; set it
            to False if these always receive one.

    Returns:
        Each loss and each term for all positions, [tokens].
    """
    call = _Call(function, teacher, targets, ChunkPlan.of(hidden, head, chunk_tokens), store)
    results = _MapLogits.apply(hidden, head.weight, head.bias, call)
    split = len(results) - len(call.names)
    return list(results[:split]), dict(zip(call.names, results[split:], strict=True))


@dataclass
class _Call:
    """The function with the arguments of all positions; it is called with those of a chunk."""

    function: ChunkLoss
    teacher: Tensor | SignalBatch
    targets: Tensor | None
    plan: ChunkPlan
    store: bool
    names: list[str] = field(default_factory=list)
    """Names of the terms, once the function was called."""

    def __call__(self, logits: Tensor, chunk: slice) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        teacher = self.teacher.slice_tokens(chunk) if isinstance(self.teacher, SignalBatch) else self.teacher[chunk]
        return self.function(logits, teacher, None if self.targets is None else self.targets[chunk])


class _MapLogits(torch.autograd.Function):
    """Forward and backward of `map_logits`."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, call: _Call):
        ctx.set_materialize_grads(False)
        ctx.call, ctx.stored = call, dict[int, Tensor]()
        device = hidden.device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        plan, stored_bytes, parts = call.plan, 0, []
        product = HeadProduct(weight, bias, plan)
        for chunk in plan.chunks(len(hidden)):
            with torch.autocast(device, enabled=False):
                _, logits = product.scores(hidden[chunk])
            stored_bytes += logits.numel() * plan.product_dtype.itemsize
            store = call.store and stored_bytes <= plan.kept_bytes
            with torch.set_grad_enabled(store):
                leaf = logits.detach().requires_grad_(store)
                losses, terms = call(leaf, chunk)
            if store:
                grad = _gradient(losses[:1], leaf, [torch.ones_like(losses[0])])
                ctx.stored[chunk.start] = product.before_scaling(grad, logits).to(plan.product_dtype)
            parts.append([loss.detach() for loss in losses] + list(terms.values()))
            call.names[:] = terms
        results = tuple(torch.cat(result) for result in zip(*parts, strict=True))
        ctx.losses = len(results) - len(call.names)
        ctx.mark_non_differentiable(*results[ctx.losses :])
        ctx.save_for_backward(hidden, weight, bias)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        hidden, weight, bias = ctx.saved_tensors
        call, first, others = ctx.call, grads[0], grads[1 : ctx.losses]
        device, dtype, enabled = ctx.autocast
        use_stored = first is not None and all(grad is None for grad in others)
        gradients = HeadGradients(hidden, weight, bias, ctx.needs_input_grad)
        with torch.autocast(device, enabled=False):
            product = HeadProduct(weight, bias, call.plan)
            for chunk in call.plan.chunks(len(hidden)):
                stored = ctx.stored.pop(chunk.start, None)
                if stored is not None and use_stored:
                    gradients.add(chunk, stored, product.weight, first[chunk])
                    continue
                memory, logits = product.scores(hidden[chunk])
                leaf = logits.detach().requires_grad_()
                with torch.enable_grad(), torch.autocast(device, dtype, enabled):
                    losses, _ = call(leaf, chunk)
                incoming = [None if grad is None else grad[chunk] for grad in grads[: ctx.losses]]
                grad = product.before_scaling(_gradient(losses, leaf, incoming), logits)
                gradients.add(chunk, grad.to(memory.dtype), product.weight)
        return gradients.hidden, gradients.final_weight(), gradients.final_bias(), None


def _gradient(losses: tuple[Tensor, ...], logits: Tensor, incoming: list[Tensor | None]) -> Tensor:
    """Return the gradient of the losses with respect to the logits, given the gradients of the losses."""
    pairs = [pair for pair in zip(losses, incoming, strict=True) if pair[0].requires_grad and pair[1] is not None]
    if not pairs:
        return torch.zeros_like(logits)
    outputs, grads = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, logits, grads)[0]
