"""How alike teacher and student are at each token, for the metrics: computed beside a divergence from the same
log-probs, without gradient."""

import torch
from torch import Tensor

OVERLAP_TOKENS = 16
"""Number of most likely tokens whose overlap is measured, as in "Rethinking On-Policy Distillation" (arXiv
2604.13016)."""


@torch.no_grad()
def compare_outcomes(log_p: Tensor, log_q: Tensor, top_log_q: Tensor, named: int) -> dict[str, Tensor]:
    """Compare two distributions over the same outcomes.

    Args:
        log_p: log-probs of the teacher, [tokens, outcomes]; its k most likely tokens are among the outcomes.
        log_q: log-probs of the student over the same outcomes.
        top_log_q: log-probs of the student's k most likely tokens of the whole vocabulary, [tokens, k], in descending
            order.
        named: number of leading outcomes that are tokens, at least k; another one is the total of all other tokens.

    Returns:
        [tokens] each: `overlap`, the share of the teacher's k most likely tokens that are among the student's k most
        likely ones; `disagreement`, 1 where the most likely tokens differ, else 0; `teacher_entropy` and
        `student_entropy` over the outcomes, in nats: with a total of other tokens, lower bounds.
    """
    likeliest = log_p[:, :named].topk(top_log_q.shape[1], dim=1).indices
    own = log_q.gather(1, likeliest)
    return {
        "overlap": (own >= top_log_q[:, -1:]).to(log_q.dtype).mean(dim=1),
        "disagreement": (own[:, 0] < top_log_q[:, 0]).to(log_q.dtype),
        "teacher_entropy": _entropy(log_p),
        "student_entropy": _entropy(log_q.detach()),
    }


@torch.no_grad()
def compare_vocabulary(log_p: Tensor, log_q: Tensor, named: int, count: int) -> dict[str, Tensor]:
    """Like `compare_outcomes` with the `count` most likely tokens, from outcomes that contain all tokens."""
    top = log_q[:, :named].topk(min(count, named), dim=1).values
    return compare_outcomes(log_p, log_q, top, named)


def _entropy(log_probs: Tensor) -> Tensor:
    return -(log_probs.exp() * log_probs).sum(dim=1)
