"""The loss over label words equals that of a model restricted to them."""

import math
from itertools import pairwise

import pytest
import torch

from rayk.losses import label_word_loss, sequence_sum
from tests.losses.loss_cases import gradient, random_logits

QUESTIONS = torch.tensor([0, 2, 6, 7])
GOLD = torch.tensor([1, 2, 0])


def log_words(seed):
    return -random_logits(7, 1, seed)[:, 0].abs() * 3


def by_enumeration(student, teacher):
    """Every word of every question by itself."""
    hard, soft = [], []
    for first, end, gold in zip(QUESTIONS, QUESTIONS[1:], GOLD, strict=False):
        words = range(int(first), int(end))
        ours = [math.exp(student[c]) / sum(math.exp(student[d]) for d in words) for c in words]
        theirs = [math.exp(teacher[c]) / sum(math.exp(teacher[d]) for d in words) for c in words]
        hard.append(-math.log(ours[int(gold)]))
        cross_entropy = -sum(p * math.log(q) for p, q in zip(theirs, ours, strict=True))
        soft.append(cross_entropy + sum(p * math.log(p) for p in theirs))
    return torch.tensor(hard, dtype=torch.float64), torch.tensor(soft, dtype=torch.float64)


def test_both_parts_equal_enumeration():
    student, teacher = log_words(0), log_words(1)
    for part, expected in zip(
        label_word_loss(student, teacher, GOLD, QUESTIONS), by_enumeration(student, teacher), strict=True
    ):
        torch.testing.assert_close(part, expected)


def test_only_relative_probabilities_of_the_words_count():
    student, teacher = log_words(0), log_words(1)
    shift = torch.tensor([-3.0, 5.0, 0.5], dtype=torch.float64).repeat_interleave(QUESTIONS.diff())
    for part, shifted in zip(
        label_word_loss(student, teacher, GOLD, QUESTIONS),
        label_word_loss(student + shift, teacher - 2 * shift, GOLD, QUESTIONS),
        strict=True,
    ):
        torch.testing.assert_close(shifted, part)


def test_a_student_that_agrees_has_no_soft_loss_and_no_gradient():
    words = log_words(2)
    _, soft = label_word_loss(words, words, GOLD, QUESTIONS)
    torch.testing.assert_close(soft, torch.zeros_like(soft))
    slope = gradient(lambda at: label_word_loss(at, words, GOLD, QUESTIONS)[1], words)
    torch.testing.assert_close(slope, torch.zeros_like(slope))


@pytest.mark.parametrize("part", [0, 1], ids=["hard", "soft"])
def test_the_gradient_is_the_difference_of_probabilities(part):
    student, teacher = log_words(0), log_words(1)
    slope = gradient(lambda at: label_word_loss(at, teacher, GOLD, QUESTIONS)[part], student)
    for question, (first, end) in enumerate(pairwise(QUESTIONS)):
        mine = student[first:end].softmax(0)
        wanted = teacher[first:end].softmax(0)
        if part == 0:
            wanted = torch.zeros_like(mine).index_fill(0, GOLD[question], 1.0)
        torch.testing.assert_close(slope[first:end], mine - wanted)


def test_nearly_impossible_word_gives_a_finite_loss():
    student = torch.tensor([-1e5, -1.0])
    hard, soft = label_word_loss(student, torch.tensor([-1.0, -1e5]), torch.tensor([0]), torch.tensor([0, 2]))
    assert hard.isfinite().all() and soft.isfinite().all()
    assert soft > 1000


def test_without_a_teacher_there_is_the_hard_part_alone():
    hard, soft = label_word_loss(log_words(0), None, GOLD, QUESTIONS)
    assert soft is None
    torch.testing.assert_close(hard, label_word_loss(log_words(0), log_words(1), GOLD, QUESTIONS)[0])


def test_sums_over_sequences_may_be_empty():
    values = torch.tensor([1.0, 2.0, 4.0])
    assert sequence_sum(values, torch.tensor([0, 2, 2, 3])).tolist() == [3.0, 0.0, 4.0]
