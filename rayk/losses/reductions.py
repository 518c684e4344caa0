"""From values per token to one number, and estimates of the KL from sampled tokens alone."""

import torch
from torch import Tensor

from rayk.errors import InputError


def token_mean(per_token: Tensor, count: float | Tensor) -> Tensor:
    """Σ per_token / count: the mean over all counted tokens of the global batch (ALGORITHMS §0).

    Args:
        per_token: [tokens], this micro-batch's.
        count: counted tokens of the *global* batch (all micro-batches and workers), so that every token weighs the
            same however the batch is cut. Below 1 it is treated as 1. DDP averages gradients over workers: multiply
            by their number.
    """
    return per_token.sum() / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


def sequence_mean(per_token: Tensor, offsets: Tensor) -> Tensor:
    """The mean over sequences of each one's token mean, as in GKD (arXiv 2306.13649); empty sequences do not count.

    Args:
        per_token: [tokens], sequence after sequence.
        offsets: int64 [sequences + 1], as in `SignalBatch`.
    """
    lengths = offsets.diff()
    weights = 1.0 / (lengths.clamp(min=1) * (lengths > 0).sum().clamp(min=1))
    return (per_token * weights.to(per_token.dtype).repeat_interleave(lengths)).sum()


def sequence_sum(per_token: Tensor, offsets: Tensor) -> Tensor:
    """The sum over each sequence's tokens, [sequences]; of log-probs that is the log-prob of the whole sequence.

    Args:
        per_token: [tokens], sequence after sequence.
        offsets: int64 [sequences + 1], as in `SignalBatch`.
    """
    sequences = torch.arange(len(offsets) - 1, device=offsets.device).repeat_interleave(offsets.diff())
    return per_token.new_zeros(len(offsets) - 1).index_add(0, sequences, per_token)


def kl_estimate(student_logprobs: Tensor, teacher_logprobs: Tensor, kind: str = "k1") -> Tensor:
    """Estimates of KL(student‖teacher) from tokens the *student* sampled (joschu.net/blog/kl-approx; ALGORITHMS §4).

    With ρ = p/q on the sampled token: k1 = −log ρ (unbiased, high variance), k2 = ½·(log ρ)² (biased, low variance),
    k3 = ρ − 1 − log ρ (unbiased, never negative). Not clamped: clipping is the method's setting.

    The value and its gradient estimate different things. Differentiated through the student's log-probs, k1's
    gradient has mean zero (it trains nothing), k2's averages to the gradient of *reverse* KL, k3's to that of
    *forward* KL. For reverse KL use k2, or the policy form (log q − log p).detach()·log q.

    Args:
        student_logprobs: [tokens], log q of the sampled tokens.
        teacher_logprobs: [tokens], log p of the same tokens; detached.

    Returns:
        Nats per token, [tokens].

    Raises:
        InputError: `kind` is none of the three.
    """
    log_ratio = _wide(teacher_logprobs).detach() - _wide(student_logprobs)
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    if kind == "k3":
        return log_ratio.expm1() - log_ratio
    raise InputError(f"There is no KL estimate '{kind}'; give 'k1', 'k2' or 'k3'.")


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
