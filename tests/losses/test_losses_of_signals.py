"""Losses on `hidden` signals equal the dense ones; on `sampled` signals they are unbiased."""

from dataclasses import replace

import pytest
import torch
from loss_cases import gradient, random_head, random_logits

from rayk import losses
from rayk.config.support import Hidden, Logprob, Sampled, TopK
from rayk.engines.reduce import reduce_logits
from rayk.errors import InputError
from rayk.models import Head
from rayk.signals.batch import SignalBatch

N, V, WIDTH = 7, 23, 5
HEADS = [{}, {"bias": True}, {"scale": 0.25, "softcap": 3.0, "bias": True}]


def hidden_signals(head: Head, vocab_size: int = V) -> SignalBatch:
    hidden = random_logits(N, WIDTH, seed=3, dtype=torch.float32)
    offsets, logprobs = torch.tensor([0, N]), torch.zeros(N)
    return SignalBatch(Hidden("float32"), offsets, logprobs, vocab_size, hidden=hidden, head=head)


@pytest.mark.parametrize("parts", HEADS, ids=str)
@pytest.mark.parametrize("name", list(losses.DIVERGENCES))
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_hidden_signals_give_the_dense_divergence_and_its_gradient(name, parts, temperature):
    teacher = hidden_signals(random_head(V, WIDTH, seed=4, dtype=torch.float32, **dict(parts)))
    student = random_logits(N, V, seed=5, dtype=torch.float32)

    def loss(signal):
        return lambda at: losses.divergence(name, at, signal, temperature=temperature)

    torch.testing.assert_close(loss(teacher)(student), loss(teacher.logits())(student))
    torch.testing.assert_close(gradient(loss(teacher), student), gradient(loss(teacher.logits()), student))


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_chunked_form_is_equal(name, chunk):
    teacher = hidden_signals(random_head(V, WIDTH, seed=4, dtype=torch.float32, softcap=4.0))
    head = random_head(V, WIDTH, seed=6, dtype=torch.float32)
    hidden = random_logits(N, WIDTH, seed=7, dtype=torch.float32)
    targets = torch.arange(N)

    def chunked(at):
        distance, cross_entropy = losses.linear_divergence(at, head, teacher, name, targets=targets, chunk_tokens=chunk)
        return distance + cross_entropy

    def whole(at):
        logits = head.logits(at)
        hard = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        return losses.divergence(name, logits, teacher.logits()) + hard

    torch.testing.assert_close(chunked(hidden), whole(hidden), rtol=1e-4, atol=1e-5)
    ours = gradient(chunked, hidden)
    on_weight, head.weight.grad = head.weight.grad, None
    torch.testing.assert_close(ours, gradient(whole, hidden), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(on_weight, head.weight.grad, rtol=1e-4, atol=1e-4)
    assert teacher.head.weight.grad is None


@pytest.mark.parametrize("columns", [V - 3, V, V + 4])
def test_columns_that_are_not_shared_tokens_are_one_outcome(columns):
    """The teacher's head has V columns of which V - 3 are shared tokens; the student may have other columns, too."""
    teacher = hidden_signals(random_head(V, WIDTH, seed=4, dtype=torch.float32), vocab_size=V - 3)
    student = random_logits(N, columns, seed=5, dtype=torch.float32)

    def reduced(logits):
        probabilities = logits.softmax(1)
        return torch.cat([probabilities[:, : V - 3], probabilities[:, V - 3 :].sum(1, keepdim=True)], dim=1)

    # Without other columns the student cannot place the teacher's remaining probability anywhere.
    p, q = (reduced(teacher.logits()[:, : V - 3] if columns == V - 3 else teacher.logits()), reduced(student))
    expected = torch.where(p > 0, p * (p / q).log(), 0.0).sum(1)
    torch.testing.assert_close(losses.forward_kl(student, teacher), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="only 19 columns"):
        losses.forward_kl(student[:, :19], teacher)


def test_a_signal_of_all_the_students_tokens_has_no_tail():
    """Where the teacher's embedding is padded and the student's is not."""
    logits, student = random_logits(N, V, 2, dtype=torch.float32), random_logits(N, V - 3, 5, dtype=torch.float32)
    columns = reduce_logits(logits.clone(), torch.zeros(N, dtype=torch.long), TopK(V - 3), V - 3)
    signals = SignalBatch(TopK(V - 3), torch.tensor([0, N]), vocab_size=V - 3, **columns)
    torch.testing.assert_close(losses.forward_kl(student, signals), losses.forward_kl(student, logits[:, : V - 3]))
    assert losses.forward_kl(logits, signals).abs().max() < 1e-5


def test_decoupled_losses_read_hidden_signals():
    teacher = hidden_signals(random_head(V, WIDTH, seed=4, dtype=torch.float32))
    student, targets = random_logits(N, V, seed=5, dtype=torch.float32), torch.arange(N)
    for temperature in (1.0, 3.0):
        torch.testing.assert_close(
            losses.decoupled_kl(student, teacher, targets, temperature=temperature),
            losses.decoupled_kl(student, teacher.logits(), targets, temperature=temperature),
        )
    logprobs = teacher.logits().log_softmax(1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(
        losses.gold_uncertainty(replace(teacher, target_logprobs=logprobs), targets),
        losses.gold_uncertainty(teacher.logits(), targets),
    )


def sampled_signals(logits, support, coins):
    columns = reduce_logits(logits.clone(), torch.zeros(len(logits), dtype=torch.long), support, logits.shape[1], coins)
    return SignalBatch(support, torch.tensor([0, len(logits)]), vocab_size=logits.shape[1], **columns)


@pytest.mark.parametrize("tau", [1.0, 0.8])
def test_sampled_forward_kl_and_its_gradient_are_right_on_average(tau):
    student, teacher = random_logits(N, V, 1, dtype=torch.float32), random_logits(N, V, 2, dtype=torch.float32)
    generator, rounds = torch.Generator().manual_seed(0), 2_000
    # All rounds at once: each is a position of its own.
    coins = torch.rand(N * rounds, 12, generator=generator, dtype=torch.float64)
    signals = sampled_signals(teacher.repeat(rounds, 1), Sampled(12, tau), coins)
    values = losses.forward_kl(student.repeat(rounds, 1), signals).view(rounds, N)
    exact = losses.forward_kl(student, teacher)
    error = values.std(0) / rounds**0.5
    assert bool(((values.mean(0) - exact).abs() < 5 * error).all())
    slopes = gradient(lambda at: losses.forward_kl(at, signals), student.repeat(rounds, 1)).view(rounds, N, V)
    error = slopes.std(0) / rounds**0.5 + 1e-4
    slope = gradient(lambda at: losses.forward_kl(at, teacher), student)
    assert bool(((slopes.mean(0) - slope).abs() < 5 * error).all())


def test_chunked_form_accepts_sampled_signals():
    support = Sampled(6)
    coins = torch.rand(N, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    signals = sampled_signals(random_logits(N, V, 2, dtype=torch.float32), support, coins)
    head = random_head(V, WIDTH, seed=6, dtype=torch.float32)
    hidden = random_logits(N, WIDTH, seed=7, dtype=torch.float32)
    torch.testing.assert_close(
        losses.linear_divergence(hidden, head, signals), losses.forward_kl(head.logits(hidden), signals)
    )
    torch.testing.assert_close(
        gradient(lambda at: losses.linear_divergence(at, head, signals), hidden),
        gradient(lambda at: losses.forward_kl(head.logits(at), signals), hidden),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    for name, temperature in (("reverse_kl", 1.0), ("forward_kl", 2.0)):
        with pytest.raises(InputError, match="estimates forward_kl at temperature 1 only"):
            losses.linear_divergence(hidden, head, signals, name, temperature=temperature)
        with pytest.raises(InputError, match="support 'hidden'"):
            losses.divergence(name, head.logits(hidden), signals, temperature=temperature)


def test_signal_without_the_required_parts_is_refused():
    signals = hidden_signals(random_head(V, WIDTH, dtype=torch.float32))
    student = random_logits(N, V, dtype=torch.float32)
    with pytest.raises(InputError, match="with its teacher's head"):
        losses.forward_kl(student, replace(signals, head=None))
    bare = SignalBatch(Logprob(), signals.offsets, signals.target_logprobs, V)
    with pytest.raises(InputError, match="kl_estimate"):
        losses.forward_kl(student, bare)
