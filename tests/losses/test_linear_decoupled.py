"""The parts of decoupled losses from hidden states equal those from dense logits, in values and gradients."""

import pytest
import torch
from loss_cases import random_head, random_logits, signals_of

from rayk import losses
from rayk.config.support import Hidden
from rayk.errors import InputError
from rayk.losses.linear_decoupled import _first_absent
from rayk.signals.batch import SignalBatch

N, V, WIDTH = 9, 13, 5
TARGETS = torch.tensor([0, 12, 3, 3, 7, 1, 9, 4, 11])


def student_parts(seed=3):
    hidden = random_logits(N, WIDTH, seed, scale=1.5)
    return hidden.requires_grad_(), random_head(V, WIDTH, seed + 1, bias=True, scale=0.7)


def dense_terms(hidden, head, teacher, targets, temperature):
    logits = (hidden @ head.weight.t() + head.bias) * head.scale
    parts = [
        losses.decoupled_kl(logits, teacher, targets, alpha=alpha, beta=1 - alpha, temperature=temperature)
        for alpha in (1.0, 0.0)
    ]
    return *parts, -logits.log_softmax(1).gather(1, targets[:, None])[:, 0]


def assert_equal_terms(teacher, temperature=1.0, targets=TARGETS):
    hidden, head = student_parts()
    found = losses.linear_decoupled_terms(
        hidden, head, teacher, targets, temperature=temperature, chunk_tokens=4, compared=3
    )[:3]
    expected = dense_terms(hidden, head, teacher, targets, temperature)
    weights = random_logits(3, N, 8)
    inputs = [hidden, head.weight, head.bias]
    for ours, dense in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, dense)
    gradients = [
        torch.autograd.grad(sum((w * part).sum() for w, part in zip(weights, parts, strict=True)), inputs)
        for parts in (found, expected)
    ]
    for ours, dense in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, dense)


@pytest.mark.parametrize("k", [1, 4, V - 1, V])
def test_signals_with_ids(k):
    assert_equal_terms(signals_of(random_logits(N, V, 2), k, TARGETS))


def test_another_temperature_where_gold_is_among_the_ids():
    teacher = random_logits(N, V, 2)
    teacher[torch.arange(N), TARGETS] += 20.0
    assert_equal_terms(signals_of(teacher, 3, TARGETS, (1.0, 2.0)), temperature=2.0)


def test_another_temperature_where_gold_is_not_among_the_ids_is_refused():
    hidden, head = student_parts()
    signals = signals_of(random_logits(N, V, 2), 2, TARGETS, (1.0, 2.0))
    with pytest.raises(InputError, match="not among the signal's ids"):
        losses.linear_decoupled_terms(hidden, head, signals, TARGETS, temperature=2.0)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("shared", [V, V - 1])
def test_hidden_states_with_and_without_columns_that_are_not_shared(temperature, shared):
    targets = TARGETS.clamp(max=shared - 1)
    states = random_logits(N, WIDTH, 6, scale=2.0)
    head = random_head(V, WIDTH, 7)
    logprobs = (states @ head.weight.t()).log_softmax(1).gather(1, targets[:, None])[:, 0].detach()
    teacher = SignalBatch(Hidden(), torch.tensor([0, N]), logprobs, shared, hidden=states, head=head)
    assert_equal_terms(teacher, temperature, targets)


def test_confident_students_keep_the_difference_between_unlikely_tokens():
    """The tail is computed as a sum: subtracting gold's probability from 1 would leave nothing in float32."""
    hidden = torch.tensor([[20.0, 1.0]], requires_grad=True)
    head = random_head(4, 2, dtype=torch.float32)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [0.0, 3.0]]))
    teacher = signals_of(torch.tensor([[20.0, 3.0, 2.0, 1.0]]), 2, torch.tensor([0]))
    terms = losses.linear_decoupled_terms(hidden, head, teacher, torch.tensor([0]))
    p, q = torch.tensor([3.0, 2.0, 1.0]).softmax(0), torch.tensor([1.0, 2.0, 3.0]).softmax(0)
    p, q = torch.stack([p[0], p[1:].sum()]), torch.stack([q[0], q[1:].sum()])
    torch.testing.assert_close(terms.others[0], (p * (p / q).log()).sum(), rtol=1e-4, atol=1e-5)


def test_the_first_absent_id_is_none_of_the_ids():
    ids = torch.tensor([[0, 1, 2], [2, 0, 4], [5, 3, 1], [1, 0, 3]])
    assert _first_absent(ids).tolist() == [3, 1, 0, 2]
