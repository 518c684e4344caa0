"""Losses on the distribution over the label words of a question (in-context learning distillation, Huang et al. 2022,
arXiv 2212.10670).

A label word c may have several tokens; log P(c | x) is the sum of their log-probs, each given the tokens before it. The
probabilities of the words C of a question are renormalized over C, so the mass of any other text plays no role.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from rayk.losses.divergences import forward_kl
from rayk.losses.precision import upcast


def label_word_loss(
    student: Tensor, teacher: Tensor | None, gold: Tensor, questions: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the hard and the soft loss of each question.

    Args:
        student: [words], the student's log P(c | x) in nats, question after question.
        teacher: [words], the teacher's log P(c | x), detached; None without a teacher.
        gold: int64 [questions], the index of the right answer among the words of the question.
        questions: int64 [questions + 1]; question i has the words questions[i]:questions[i + 1].

    Returns:
        −log P_student(gold) over C, and KL(P_teacher ‖ P_student) over C (the soft cross-entropy minus the teacher's
        entropy, with the same gradient) or None; nats, [questions] each.
    """
    scores = _pad_questions(student, questions)
    hard = F.cross_entropy(scores, gold, reduction="none")
    return hard, None if teacher is None else forward_kl(scores, _pad_questions(teacher, questions))


def _pad_questions(logprobs: Tensor, questions: Tensor) -> Tensor:
    """Reshape [words] to [questions, maximum number of words]; -inf where a question has fewer words."""
    counts = questions.diff()
    present = torch.arange(int(counts.max()), device=counts.device) < counts[:, None]
    wide = upcast(logprobs)
    return torch.full(present.shape, -torch.inf, dtype=wide.dtype, device=wide.device).masked_scatter(present, wide)
