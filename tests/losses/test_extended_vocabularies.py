"""Losses between vocabularies that extend one another: shared tokens are compared, all others are one outcome."""

import pytest
import torch
from loss_cases import gradient, random_logits

from rayk import losses
from rayk.config.support import Hidden, Requested, Sampled, TopK
from rayk.engines.reduce import reduce_logits
from rayk.models import Head
from rayk.signals.batch import SignalBatch

N, SHARED, TEACHER_ONLY, STUDENT_ONLY = 6, 17, 3, 2
# adaptive KL's head depends on the order of tokens and needs no test of its own here
NAMES = [name for name in losses.DIVERGENCES if name != "adaptive_kl"]


def teacher_logits(extra=TEACHER_ONLY):
    return random_logits(N, SHARED + extra, seed=1, dtype=torch.float32)


def signals_of(logits, support):
    offsets, targets = torch.tensor([0, N]), torch.arange(N)
    if isinstance(support, Hidden):
        head = Head(torch.eye(logits.shape[1]))
        return SignalBatch(support, offsets, torch.zeros(N), SHARED, hidden=logits, head=head)
    inputs = None
    if isinstance(support, Requested):
        inputs = torch.arange(3).expand(N, 3)
    if isinstance(support, Sampled):
        inputs = torch.rand(N, support.draws, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    columns = reduce_logits(logits.clone(), targets, support, SHARED, inputs)
    return SignalBatch(support, offsets, vocab_size=SHARED, **columns)


SUPPORTS = [TopK(4), TopK(SHARED), Requested(2), Hidden("float32")]


def equal_student(logits, extra=STUDENT_ONLY):
    """Logits of a student that agrees with the teacher on the shared tokens and on the total of all others."""
    rest = logits[:, SHARED:].logsumexp(1, keepdim=True)
    return torch.cat([logits[:, :SHARED], (rest - torch.tensor(float(extra)).log()).expand(N, extra)], dim=1)


@pytest.mark.parametrize("support", SUPPORTS, ids=lambda support: f"{support.kind}{getattr(support, 'k', '')}")
@pytest.mark.parametrize("name", NAMES)
def test_a_student_that_agrees_on_the_shared_tokens_has_no_loss(name, support):
    logits = teacher_logits()
    student = equal_student(logits)
    assert losses.divergence(name, student, signals_of(logits, support)).abs().max() < 1e-5
    assert gradient(lambda at: losses.forward_kl(at, signals_of(logits, support)), student).abs().max() < 1e-5


@pytest.mark.parametrize("support", SUPPORTS[:3], ids=lambda support: f"{support.kind}{support.k}")
def test_no_probability_is_lost(support):
    signals = signals_of(teacher_logits(), support)
    total = torch.cat([signals.logprobs, signals.log_tails], dim=1).logsumexp(1)
    torch.testing.assert_close(total, torch.zeros(N), atol=1e-5, rtol=0)
    assert int(signals.ids.max()) < SHARED
    if support == TopK(SHARED):
        foreign = teacher_logits().softmax(1)[:, SHARED:].sum(1)
        torch.testing.assert_close(signals.log_tails[:, 0].exp(), foreign)


@pytest.mark.parametrize("support", SUPPORTS, ids=lambda support: f"{support.kind}{getattr(support, 'k', '')}")
def test_the_gradient_at_tokens_that_only_the_student_has(support):
    """d/dz_j = q_j − p_tail·q_j/q_tail for forward KL: they share what the teacher leaves to other tokens."""
    logits, student = teacher_logits(), random_logits(N, SHARED + STUDENT_ONLY, 5, dtype=torch.float32)
    signals = signals_of(logits, support)
    ours = gradient(lambda at: losses.forward_kl(at, signals), student)[:, SHARED:]
    p, q = logits.softmax(1), student.softmax(1)
    if isinstance(support, Hidden):
        p_tail, q_tail = p[:, SHARED:].sum(1), q[:, SHARED:].sum(1)
    else:
        p_tail, q_tail = 1 - p.gather(1, signals.ids).sum(1), 1 - q.gather(1, signals.ids).sum(1)
    expected = q[:, SHARED:] * (1 - p_tail / q_tail)[:, None]
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)


def test_a_teacher_without_other_tokens_takes_all_probability_from_those_of_the_student():
    student = random_logits(N, SHARED + STUDENT_ONLY, 5, dtype=torch.float32)
    for support in (Hidden("float32"), TopK(SHARED)):
        signals = signals_of(teacher_logits(0), support)
        ours = gradient(lambda at, signals=signals: losses.forward_kl(at, signals), student)[:, SHARED:]
        torch.testing.assert_close(ours, student.softmax(1)[:, SHARED:], rtol=1e-4, atol=1e-6)


def test_draws_are_from_the_shared_tokens_alone():
    logits = teacher_logits()
    signals = signals_of(logits, Sampled(SHARED))
    p = logits[:, :SHARED].log_softmax(1)
    assert int(signals.ids.max()) < SHARED
    torch.testing.assert_close(signals.weights.sum(1), torch.ones(N))
    torch.testing.assert_close(signals.entropies, -(p.exp() * p).sum(1))


@pytest.mark.parametrize("name", NAMES)
def test_the_chunked_form_is_equal(name):
    logits, head = teacher_logits(), Head(torch.eye(SHARED + STUDENT_ONLY))
    student = random_logits(N, SHARED + STUDENT_ONLY, 5, dtype=torch.float32)
    for support in SUPPORTS:
        signals = signals_of(logits, support)
        chunked = losses.linear_divergence(student, head, signals, name, chunk_tokens=2)
        torch.testing.assert_close(chunked, losses.divergence(name, student, signals), rtol=1e-4, atol=1e-5)
