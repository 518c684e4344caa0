"""Reductions of values per token, and estimates of the KL divergence from sampled tokens."""

import torch
from torch import Tensor

from rayk.errors import InputError
from rayk.losses.precision import upcast


def token_mean(per_token: Tensor, count: float | Tensor) -> Tensor:
    """Return Σ per_token / count, a micro-batch's share of the mean over all counted tokens of the global batch.

    Args:
        per_token: [tokens], the values of this micro-batch.
        count: number of counted tokens in the *global* batch (all micro-batches and workers), so that every token has
            the same weight however the batch is split; at least 1 is used. DDP averages gradients over workers, so
            multiply the result by the number of workers there.
    """
    return per_token.sum() / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


def sequence_mean(per_token: Tensor, offsets: Tensor, count: float | None = None) -> Tensor:
    """Return the mean over sequences of their token means, as in GKD (arXiv 2306.13649); empty sequences are skipped.

    Args:
        per_token: [tokens], sequence after sequence.
        offsets: int64 [sequences + 1], as in `SignalBatch`.
        count: number of sequences with tokens in the *global* batch, as in `token_mean`; None for the number of these.
    """
    lengths = offsets.diff()
    sequences = (lengths > 0).sum().clamp(min=1) if count is None else max(count, 1)
    weights = 1.0 / (lengths.clamp(min=1) * sequences)
    return (per_token * weights.to(per_token.dtype).repeat_interleave(lengths)).sum()


def group_mean(per_token: Tensor, groups: Tensor, sizes: Tensor, count: float | None = None) -> Tensor:
    """Return the mean over groups of tokens of their token means, such as the tokens of each teacher; empty groups are
    skipped.

    Args:
        per_token: [tokens].
        groups: int64 [tokens], the index of each token's group.
        sizes: [groups], the number of tokens of each group in the *global* batch, as in `token_mean`.
        count: number of groups with tokens in the global batch; None for that of `sizes`.
    """
    present = (sizes > 0).sum().clamp(min=1) if count is None else max(count, 1)
    weights = 1.0 / (sizes.clamp(min=1) * present)
    return (per_token * weights.to(per_token.dtype)[groups]).sum()


def sequence_sum(per_token: Tensor, offsets: Tensor) -> Tensor:
    """Return the sum over each sequence's tokens, [sequences]; for log-probs, the log-prob of the whole sequence.

    Args:
        per_token: [tokens], sequence after sequence.
        offsets: int64 [sequences + 1], as in `SignalBatch`.
    """
    sequences = torch.arange(len(offsets) - 1, device=offsets.device).repeat_interleave(offsets.diff())
    return per_token.new_zeros(len(offsets) - 1).index_add(0, sequences, per_token)


def kl_estimate(student_logprobs: Tensor, teacher_logprobs: Tensor, kind: str = "k1") -> Tensor:
    """Estimate KL(student‖teacher) from tokens that the *student* sampled (Schulman, joschu.net/blog/kl-approx).

    With ρ = p/q of the sampled token: k1 = −log ρ (unbiased, high variance), k2 = ½·(log ρ)² (biased, low variance),
    k3 = ρ − 1 − log ρ (unbiased, never negative). The estimates are not clipped.

    Value and gradient estimate different quantities. Differentiated through the student's log-probs, the gradient of
    k1 has mean zero (it trains nothing), that of k2 averages to the gradient of *reverse* KL, and that of k3 to the
    gradient of *forward* KL. To train with reverse KL use k2, or the policy form (log q − log p).detach()·log q.

    Args:
        student_logprobs: [tokens], log q of the sampled tokens.
        teacher_logprobs: [tokens], log p of the same tokens; detached.

    Returns:
        Nats per token, [tokens].

    Raises:
        InputError: `kind` is not one of the three.
    """
    log_ratio = upcast(teacher_logprobs).detach() - upcast(student_logprobs)
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    if kind == "k3":
        return log_ratio.expm1() - log_ratio
    raise InputError(f"There is no KL estimate '{kind}'; give 'k1', 'k2' or 'k3'.")
