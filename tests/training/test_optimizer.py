"""The optimizers, their learning rate and their state."""

import importlib.util
import io

import pytest
import torch

from rayk.config import TrainingConfig
from rayk.errors import InputError
from rayk.training.optimizer import make_optimizer, set_learning_rate

HAS_TORCHAO = importlib.util.find_spec("torchao") is not None


def needs_torchao(test):
    """Mark a test as one of `make test-nightly`, which installs torchao."""
    return pytest.mark.nightly(pytest.mark.skipif(not HAS_TORCHAO, reason="torchao is not installed")(test))


def settings(**changes):
    return TrainingConfig(**{"learning_rate": 0.01, **changes})


def train(optimizer_name, steps=40):
    """Fit a linear map; return its module, the optimizer and the losses."""
    torch.manual_seed(0)
    module, target = torch.nn.Linear(128, 128), torch.randn(128, 128)
    optimizer = make_optimizer(list(module.parameters()), settings(optimizer=optimizer_name))
    losses = []
    for step in range(steps):
        set_learning_rate(optimizer, 0.01 * min(1.0, (step + 1) / 10))
        inputs = torch.randn(128, 128)
        loss = (module(inputs) - inputs @ target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return module, optimizer, losses


def state_bytes(optimizer):
    """Bytes of both moments of the weight matrix, as saved."""
    buffer = io.BytesIO()
    state = optimizer.state_dict()["state"][0]
    torch.save({name: state[name] for name in ("exp_avg", "exp_avg_sq")}, buffer)
    return len(buffer.getvalue())


def test_the_rate_of_every_group_is_set():
    module = torch.nn.Linear(4, 4)
    optimizer = make_optimizer(list(module.parameters()), settings())
    set_learning_rate(optimizer, 0.5)
    assert len(optimizer.param_groups) == 2 and {group["lr"] for group in optimizer.param_groups} == {0.5}


@pytest.mark.skipif(HAS_TORCHAO, reason="torchao is installed")
def test_8_bit_adamw_without_its_package_is_refused():
    with pytest.raises(InputError, match=r"training.optimizer 'adamw_8bit' needs torchao.*rayk\[torchao\]"):
        make_optimizer(list(torch.nn.Linear(4, 4).parameters()), settings(optimizer="adamw_8bit"))


@needs_torchao
def test_8_bit_adamw_learns_as_adamw_with_a_third_of_its_state():
    whole, exact, expected = train("adamw")
    module, optimizer, losses = train("adamw_8bit")
    assert losses[-1] < 0.9 * losses[0] and losses == pytest.approx(expected, rel=0.02)
    assert (module.weight - whole.weight).abs().max() < 0.1 * whole.weight.abs().max()
    assert module.weight.dtype == torch.float32
    assert state_bytes(optimizer) < 0.35 * state_bytes(exact)


@needs_torchao
def test_8_bit_state_is_restored_from_a_safe_file():
    _, optimizer, _ = train("adamw_8bit", steps=3)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    _, other, _ = train("adamw_8bit", steps=1)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    before, after = (each.state_dict()["state"][0] for each in (optimizer, other))
    assert float(after["step"]) == 3
    assert torch.equal(before["exp_avg"].codes, after["exp_avg"].codes)
    assert type(after["exp_avg"]) is type(before["exp_avg"])
