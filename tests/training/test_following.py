"""The weights of a teacher that follows the student, against closed forms."""

import pytest
import torch
from torch import nn

from rayk.training.following import FollowingWeights


class Small(nn.Module):
    """A trained weight, a frozen one and a buffer."""

    def __init__(self):
        super().__init__()
        self.trained = nn.Parameter(torch.tensor([1.0, -2.0]))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("count", torch.zeros(1))


def train(module, step):
    """Set the weights of one step; they are not a smooth function of the step."""
    with torch.no_grad():
        module.trained.copy_(torch.tensor([step * step * 1.0, (-1.0) ** step]))
        module.count.fill_(step)
    return module.trained.detach().clone()


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("decay", [0.9, 0.25])
def test_average_is_the_closed_form(decay, every):
    module = Small()
    first, weights = module.trained.detach().clone(), FollowingWeights(module, decay, every)
    seen = []
    for step in range(1, 11):
        now = train(module, step)
        if weights.update(step):
            seen.append(now)
        n = len(seen)
        assert n == step // every
        expected = decay**n * first + (1 - decay) * sum(decay ** (n - 1 - i) * each for i, each in enumerate(seen))
        torch.testing.assert_close(weights.tensors["trained"], expected)
        assert weights.tensors["count"] == every * n
        assert "frozen" not in weights.tensors


@pytest.mark.parametrize("every", [1, 4])
def test_decay_of_zero_copies(every):
    """It is the limit of small decays, and exact."""
    module = Small()
    copies, limit = FollowingWeights(module, 0.0, every), FollowingWeights(module, 1e-7, every)
    expected = module.trained.detach().clone()
    for step in range(1, 10):
        now = train(module, step)
        expected = expected if step % every else now
        assert copies.update(step) == limit.update(step) == (step % every == 0)
        assert torch.equal(copies.tensors["trained"], expected)
        torch.testing.assert_close(limit.tensors["trained"], expected, rtol=1e-5, atol=1e-4)


def test_weights_that_equal_the_students_take_no_memory():
    module = Small()
    weights = FollowingWeights(module, 0.0, 1)
    assert weights.state == {} and weights.tensors["trained"] is module.trained
    assert FollowingWeights(module, 0.0, 2).state.keys() == {"trained", "count"}
