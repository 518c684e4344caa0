"""Relations among the tokens of a row, against a loop over them."""

import math

import pytest
import torch

from rayk.losses import relation_divergence

OFFSETS = torch.tensor([0, 5, 5, 6, 10])


def vectors(width, seed):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(10, width, dtype=torch.float64, generator=random)


def by_definition(student, teacher, offsets, heads):
    """Token by token and head by head."""
    losses = []
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        for token in range(start, end):
            total = 0.0
            for head in range(heads):
                scores = []
                for each in (teacher, student):
                    size = each.shape[1] // heads
                    part = each[start : token + 1, head * size : (head + 1) * size]
                    scores.append((part @ part[-1] / math.sqrt(size)).softmax(0))
                total = total + (scores[0] * (scores[0] / scores[1]).log()).sum()
            losses.append(total / heads)
    return torch.stack(losses)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_relations_are_those_of_the_definition(heads):
    """The widths of the models differ; gradients too."""
    student, teacher = vectors(12, 0).requires_grad_(), vectors(8, 1)
    found = relation_divergence(student, teacher, OFFSETS, heads)
    expected = by_definition(student, teacher, OFFSETS, heads)
    torch.testing.assert_close(found, expected)
    weights = torch.rand(10, dtype=torch.float64)
    [ours], [theirs] = (torch.autograd.grad((weights * each).sum(), [student]) for each in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_rows_do_not_see_one_another_and_the_first_token_has_no_relations():
    student, teacher = vectors(8, 0), vectors(8, 1)
    found = relation_divergence(student, teacher, OFFSETS, 2)
    assert found[[0, 5, 6]].abs().max() == 0
    assert found[[1, 2, 3, 4, 7, 8, 9]].min() > 0
    student[5:] += 1
    torch.testing.assert_close(relation_divergence(student, teacher, OFFSETS, 2)[:5], found[:5])


def test_equal_models_and_no_tokens_have_no_distance():
    one = vectors(8, 0)
    assert relation_divergence(one, one, OFFSETS, 4).abs().max() < 1e-12
    assert relation_divergence(one[:0], one[:0], torch.tensor([0]), 4).shape == (0,)
