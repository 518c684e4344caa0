"""Distillation between models whose vocabularies differ."""

from torch import Tensor
from torch.nn import functional as F

from rayk.errors import InputError
from rayk.losses.divergences import log_probs


def universal_logit_distance(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Σ |sort↓(q) − sort↓(p)|, the smaller vocabulary padded with zeros (ULD, arXiv 2402.12030; ALGORITHMS §15).

    It compares how probability is spread, not on what. Row i of both sides is compared, from each one's first answer
    position and cut to the shorter answer by the caller. The paper adds 1.5 times its mean to the cross-entropy.

    Args:
        student_logits: [tokens, vocab].
        teacher_logits: [tokens, teacher's vocab], of any size; detached.
        temperature: divides both sides' logits; 1 in the paper.

    Returns:
        A number in [0, 2] per token, [tokens]; not nats.

    Raises:
        InputError: dense logits of the same number of tokens are needed on both sides.
    """
    if not isinstance(teacher_logits, Tensor) or len(teacher_logits) != len(student_logits):
        raise InputError(
            "universal_logit_distance needs the teacher's dense logits, one row for each of the student's; "
            "signals hold only part of the distribution."
        )
    q = log_probs(student_logits, temperature).exp().sort(dim=1, descending=True).values
    p = log_probs(teacher_logits.detach(), temperature).exp().sort(dim=1, descending=True).values
    width = max(p.shape[1], q.shape[1])
    return (F.pad(q, (0, width - q.shape[1])) - F.pad(p, (0, width - p.shape[1]))).abs().sum(dim=1)
