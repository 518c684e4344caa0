"""The student's log-probs at chosen ids, computed from its hidden states one chunk of positions at a time.

With a large vocabulary the logits are the largest tensor of a training step, and softmax and autograd copy them several
times. Here only one chunk of logits exists at a time. The gradient of log-softmax has a closed form, so the backward
pass writes it into the memory of the chunk and multiplies it into the gradients of hidden states and head.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rayk.errors import InputError
from rayk.losses.divergences import LOG_FLOOR
from rayk.losses.head_product import ChunkPlan, HeadGradients, HeadProduct
from rayk.losses.precision import compute_dtype
from rayk.models import Head


def linear_cross_entropy(hidden: Tensor, head: Head, targets: Tensor, *, chunk_tokens: int | None = None) -> Tensor:
    """Return −log q(target) in nats, [tokens], from hidden states [tokens, width] and targets int64 [tokens].

    Differentiable in `hidden` and the head. The logits of all tokens never exist together.
    """
    _, _, log_q = linear_log_probs(hidden, head, targets.new_zeros(len(targets), 0), targets, 1.0, chunk_tokens)
    assert log_q is not None
    return -log_q


def linear_log_probs(
    hidden: Tensor,
    head: Head,
    ids: Tensor,
    targets: Tensor | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the student's log-probs at chosen ids, of all other tokens together, and of the targets; differentiable.

    The product with the head runs in the dtype of `hidden` (or of autocast, if on; `linear_float32`), everything after
    it in float32.

    Args:
        hidden: [tokens, width].
        head: the student's head; its weight and bias receive gradients if they require them.
        ids: int64 [tokens, k], distinct in each row; k may be 0.
        targets: int64 [tokens]; a target may be one of the ids.
        temperature: temperature of the first two results; the log-probs of the targets are at temperature 1.
        chunk_tokens: positions in a chunk; by default a float32 chunk takes about 32 MB (CPU) or 256 MB (GPU).

    Returns:
        log q of the ids [tokens, k], log of the mass of all other tokens [tokens], log q of the targets [tokens] or
        None; each at least LOG_FLOOR (the mass of other tokens is LOG_FLOOR if the ids are the whole vocabulary).

    Raises:
        InputError: the temperature or the chunk size is not positive.
    """
    found = linear_chosen_log_probs(hidden, head, ids, targets, temperature, chunk_tokens)
    return found.chosen, found.others, found.targets


class ChosenLogProbs(NamedTuple):
    """The results of `linear_chosen_log_probs`."""

    chosen: Tensor
    """log q of the ids, [tokens, k]."""
    others: Tensor
    """log of the mass of all other tokens, [tokens]."""
    targets: Tensor | None
    """log q of the targets at temperature 1, [tokens]; None without targets."""
    top: Tensor | None
    """log q of the student's own most likely tokens, in descending order, [tokens, count], without gradient; None if
    none were requested."""


def linear_chosen_log_probs(
    hidden: Tensor, head: Head, ids: Tensor, targets: Tensor | None = None, temperature: float = 1.0,
    chunk_tokens: int | None = None, *, top: int = 0,
) -> ChosenLogProbs:  # fmt: skip
    """Like `linear_log_probs`, and also return the log-probs of the student's `top` most likely tokens (fewer if the
    vocabulary is smaller), from the same logits."""
    if not temperature > 0:
        raise InputError(f"The temperature is {temperature:g}; give a number above 0.")
    plan = ChunkPlan.of(hidden, head, chunk_tokens)
    log_q, log_tail, target_log_q, top_log_q = _LinearLogProbs.apply(
        hidden, head.weight, head.bias, ids, targets, temperature, min(top, head.vocab_size), plan
    )
    return ChosenLogProbs(
        log_q.clamp(min=LOG_FLOOR), log_tail.clamp(min=LOG_FLOOR),
        None if target_log_q is None else target_log_q.clamp(min=LOG_FLOOR),
        None if top_log_q is None else top_log_q.clamp(min=LOG_FLOOR),
    )  # fmt: skip


class _LinearLogProbs(torch.autograd.Function):
    """Forward and backward of `linear_log_probs`, chunk by chunk.

    At each position, with logits z at temperature T, ids S and other tokens R: log q_i = z_i − lse, and the tail is
    lse_R − lse, where lse = logaddexp(lse_S, lse_R). With incoming gradients G_i and G_t and their sum G,
    d/dz_i = G_i − G·q_i on S and d/dz_j = (G_t − G·q_tail)·exp(z_j − lse_R) on R. A target adds
    G_y·(1[j = y] − softmax_j at T = 1), and its G_y is part of G if T = 1. lse_R subtracts the maximum over R, so that
    a tail far below the ids is small and not zero.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, targets, temperature: float, count: int, plan: ChunkPlan):
        wide = compute_dtype(hidden.dtype)
        tokens, k = ids.shape
        log_q, log_tail = hidden.new_empty(tokens, k, dtype=wide), hidden.new_empty(tokens, dtype=wide)
        target_log_q = None if targets is None else torch.empty_like(log_tail)
        top_log_q = hidden.new_empty(tokens, count, dtype=wide) if count else None
        top, total, target_lse = torch.empty_like(log_tail), torch.empty_like(log_tail), torch.empty_like(log_tail)
        two_temperatures = targets is not None and temperature != 1.0
        ctx.kept, kept_bytes = {}, 0
        with torch.autocast(hidden.device.type, enabled=False):
            product = HeadProduct(weight, bias, plan)
            for chunk in plan.chunks(tokens):
                kept_bytes += hidden[chunk].shape[0] * len(weight) * plan.product_dtype.itemsize
                keep = kept_bytes <= plan.kept_bytes and plan.softcap is None and not two_temperatures
                memory, scores = product.scores(hidden[chunk], keep)
                if targets is not None:
                    target_score = scores.gather(1, targets[chunk, None])[:, 0]
                if two_temperatures:
                    target_lse[chunk] = scores.logsumexp(dim=1)
                if temperature != 1.0:
                    scores.div_(temperature)
                chosen = scores.gather(1, ids[chunk])
                if top_log_q is not None:
                    top_log_q[chunk] = scores.topk(count, dim=1).values
                if k:
                    scores.scatter_(1, ids[chunk], -torch.inf)
                # If the ids are the whole vocabulary, any finite maximum gives exp(-inf) = 0 instead of NaN.
                top[chunk] = scores.amax(dim=1).clamp(min=torch.finfo(wide).min)
                rest = scores.sub_(top[chunk, None]).exp_()
                total[chunk] = rest.sum(dim=1)
                lse_rest = top[chunk] + total[chunk].log()
                lse = torch.logaddexp(chosen.logsumexp(dim=1), lse_rest) if k else lse_rest
                log_q[chunk], log_tail[chunk] = chosen - lse[:, None], lse_rest - lse
                if top_log_q is not None:
                    top_log_q[chunk] -= lse[:, None]
                if targets is not None:
                    assert target_log_q is not None
                    if not two_temperatures:
                        target_lse[chunk] = lse
                    target_log_q[chunk] = target_score - target_lse[chunk]
                if keep:
                    ctx.kept[chunk.start] = product.narrow(rest, memory)
        ctx.plan, ctx.temperature, ctx.two_temperatures = plan, temperature, two_temperatures
        ctx.save_for_backward(hidden, weight, bias, ids, targets, log_q, log_tail, top, total, target_lse)
        if top_log_q is not None:
            ctx.mark_non_differentiable(top_log_q)
        return log_q, log_tail, target_log_q, top_log_q

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_log_q, grad_tail, grad_target, _grad_top):
        hidden, weight, bias, ids, targets, log_q, log_tail, top, total, target_lse = ctx.saved_tensors
        plan, temperature = ctx.plan, ctx.temperature
        # Factors per row and per id, for all chunks at once; they include the scale and 1/T.
        grad_all = grad_log_q.sum(dim=1) + grad_tail
        if targets is not None and not ctx.two_temperatures:
            grad_all = grad_all + grad_target
        factor = plan.scale / temperature
        on_ids = (grad_log_q - grad_all[:, None] * log_q.exp()) * factor
        on_rest = (grad_tail - grad_all * log_tail.exp()) * factor / total.clamp(min=torch.finfo(total.dtype).tiny)
        grads = HeadGradients(hidden, weight, bias, ctx.needs_input_grad)
        with torch.autocast(hidden.device.type, enabled=False):
            product = HeadProduct(weight, bias, plan)
            for chunk in plan.chunks(len(hidden)):
                logits = None
                memory = ctx.kept.pop(chunk.start, None)
                if memory is not None:
                    rest = product.widen(memory)
                else:
                    memory, rest = product.scores(hidden[chunk], keep=False)
                    logits = rest.clone() if plan.softcap is not None or ctx.two_temperatures else None
                    if temperature != 1.0:
                        rest.div_(temperature)
                    rest.sub_(top[chunk, None]).exp_()
                grad = rest.mul_(on_rest[chunk, None])
                grad.scatter_(1, ids[chunk], on_ids[chunk].to(grad.dtype))
                if targets is not None:
                    on_target = (grad_target[chunk, None] * plan.scale).to(grad.dtype)
                    if ctx.two_temperatures:
                        assert logits is not None
                        grad.addcmul_((logits - target_lse[chunk, None]).exp_(), on_target, value=-1.0)
                    grad.scatter_add_(1, targets[chunk, None], on_target)
                if plan.softcap is not None:
                    assert logits is not None
                    grad.addcmul_(grad, logits.div_(plan.softcap).square_(), value=-1.0)
                grads.add(chunk, product.narrow(grad, memory), product.weight)
        return grads.hidden, grads.final_weight(), grads.final_bias(), None, None, None, None, None
