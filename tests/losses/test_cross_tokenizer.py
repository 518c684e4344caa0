"""Universal logit distance: sorted probabilities, whatever the vocabularies."""

import pytest
import torch
from loss_cases import random_logits, signals_of

from rayk import losses
from rayk.errors import InputError


def test_distance_is_l1_of_sorted_probabilities():
    student = torch.tensor([[0.2, 0.5, 0.3]]).log()
    teacher = torch.tensor([[0.6, 0.4]]).log()
    assert losses.universal_logit_distance(student, teacher).item() == pytest.approx(0.1 + 0.1 + 0.2, abs=1e-6)


def test_the_order_and_the_larger_vocabulary_do_not_matter():
    logits = random_logits(4, 9)
    shuffled = torch.cat([logits[:, torch.randperm(9)], torch.full((4, 3), -torch.inf)], 1)
    torch.testing.assert_close(losses.universal_logit_distance(logits, shuffled), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(losses.universal_logit_distance(shuffled, logits), torch.zeros(4, dtype=torch.float64))


def test_the_gradient_agrees_with_finite_differences():
    student, teacher = random_logits(3, 6, 1).requires_grad_(), random_logits(3, 8, 2)
    assert torch.autograd.gradcheck(lambda s: losses.universal_logit_distance(s, teacher), (student,))


def test_signals_and_unequal_answers_are_refused():
    student, teacher = random_logits(3, 6, 1), random_logits(3, 6, 2)
    for said in (signals_of(teacher, 2), teacher[:2]):
        with pytest.raises(InputError, match="needs the teacher's dense logits"):
            losses.universal_logit_distance(student, said)
