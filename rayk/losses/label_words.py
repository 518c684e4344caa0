"""Losses over a task's label words: what a model would answer if it had to name one of them.

A label word c may be several tokens; log P(c | x) is then the sum over them, each given those before it. Restricted to
the words C of a question and renormalised, that is a distribution over |C| answers, whatever the model gives to other
text (in-context learning distillation, arXiv 2212.10670; ALGORITHMS §27).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from rayk.losses.divergences import forward_kl


def label_word_loss(
    student: Tensor, teacher: Tensor | None, gold: Tensor, questions: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The hard and the soft part of the loss of each question.

    Args:
        student: [words], log P(c | x) of each question's label words, question after question, in nats.
        teacher: the teacher's of the same words, detached; None where it was not asked.
        gold: int64 [questions], which of its words is each question's answer.
        questions: int64 [questions + 1]; question i has the words questions[i]:questions[i + 1].

    Returns:
        −log P_student(gold) over C, and KL(P_teacher ‖ P_student) over C (the soft cross-entropy less the teacher's
        entropy, with the same gradient); nats, [questions] each.
    """
    ours = _in_questions(student, questions)
    hard = F.cross_entropy(ours, gold, reduction="none")
    return hard, None if teacher is None else forward_kl(ours, _in_questions(teacher, questions))


def _in_questions(logprobs: Tensor, questions: Tensor) -> Tensor:
    """[words] as [questions, most words], with no probability where a question has fewer."""
    counts = questions.diff()
    present = torch.arange(int(counts.max()), device=counts.device) < counts[:, None]
    wide = logprobs if logprobs.dtype == torch.float64 else logprobs.float()
    return torch.full(present.shape, -torch.inf, dtype=wide.dtype, device=wide.device).masked_scatter(present, wide)
