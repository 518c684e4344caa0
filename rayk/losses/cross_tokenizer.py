"""A distance between models with different vocabularies."""

from torch import Tensor
from torch.nn import functional as F

from rayk.errors import InputError
from rayk.losses.divergences import log_probs


def universal_logit_distance(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Σ |sort↓(q) − sort↓(p)|, the smaller vocabulary padded with zeros (ULD, Boizard et al. 2024, arXiv 2402.12030).

    The distance compares the shapes of two distributions, not their tokens. Row i of the student is compared with row i
    of the teacher; the caller aligns both at the first answer token and truncates the longer answer. The paper adds 1.5
    times the mean of this distance to the cross-entropy.

    Args:
        student_logits: [tokens, vocab].
        teacher_logits: [tokens, teacher's vocab], of any size; detached.
        temperature: divides both sides' logits; 1 in the paper.

    Returns:
        A distance in [0, 2] per token (not nats), [tokens].

    Raises:
        InputError: the teacher is not a tensor of dense logits, or has another number of tokens.
    """
    if not isinstance(teacher_logits, Tensor) or len(teacher_logits) != len(student_logits):
        raise InputError(
            "universal_logit_distance needs the teacher's dense logits, one row for each of the student's; "
            "signals contain only part of the distribution."
        )
    q = log_probs(student_logits, temperature).exp().sort(dim=1, descending=True).values
    p = log_probs(teacher_logits.detach(), temperature).exp().sort(dim=1, descending=True).values
    width = max(p.shape[1], q.shape[1])
    return (F.pad(q, (0, width - q.shape[1])) - F.pad(p, (0, width - p.shape[1]))).abs().sum(dim=1)
