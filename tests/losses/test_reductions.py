"""Means that do not depend on how a batch is cut, and what the KL estimates and their gradients estimate."""

import pytest
import torch
from loss_cases import gradient, random_logits

from rayk import losses
from rayk.errors import InputError


def test_micro_batches_with_the_global_count_add_up_to_the_whole():
    values = random_logits(1, 10)[0]
    parts = sum(losses.token_mean(part, 10) for part in values.split([1, 6, 3]))
    torch.testing.assert_close(parts, values.mean())
    torch.testing.assert_close(losses.token_mean(values, torch.tensor(10)), values.mean())


def test_nothing_counted_is_zero_and_not_nan():
    assert losses.token_mean(torch.zeros(0), 0).item() == 0
    assert losses.token_mean(torch.zeros(0), torch.tensor(0)).item() == 0
    assert losses.sequence_mean(torch.zeros(0), torch.tensor([0, 0])).item() == 0


def test_the_sequence_mean_weighs_sequences_alike_and_skips_empty_ones():
    values = torch.tensor([1.0, 3.0, 10.0])
    assert losses.sequence_mean(values, torch.tensor([0, 2, 2, 3])).item() == pytest.approx((2 + 10) / 2)
    parts = (
        losses.sequence_mean(values[:2], torch.tensor([0, 2, 2]), 2),
        losses.sequence_mean(values[2:], torch.tensor([0, 1]), 2),
    )
    assert sum(parts).item() == pytest.approx((2 + 10) / 2)


def test_the_group_mean_weighs_groups_alike_and_skips_empty_ones():
    values, groups = torch.tensor([1.0, 3.0, 10.0, 2.0]), torch.tensor([0, 0, 2, 0])
    sizes = torch.tensor([3, 0, 1])
    assert losses.group_mean(values, groups, sizes).item() == pytest.approx((2 + 10) / 2)
    parts = [losses.group_mean(values[part], groups[part], sizes, 2) for part in (slice(1), slice(1, 4))]
    assert sum(parts).item() == pytest.approx((2 + 10) / 2)
    assert losses.group_mean(values[:0], groups[:0], torch.zeros(3)).item() == 0


def test_padding_changes_nothing_since_only_counted_tokens_are_given():
    student, teacher = random_logits(5, 7, 1), random_logits(5, 7, 2)
    alone = losses.token_mean(losses.forward_kl(student[:3], teacher[:3]), 3)
    torch.testing.assert_close(losses.token_mean(losses.forward_kl(student, teacher)[:3], 3), alone)


def every_token(kind, student, teacher):
    """The estimate on each token of the vocabulary, [tokens, vocab]."""
    log_q, log_p = student.log_softmax(1), teacher.log_softmax(1)
    return losses.kl_estimate(log_q.flatten(), log_p.flatten(), kind).view_as(log_q)


def test_k1_and_k3_average_to_the_reverse_kl_and_k3_is_never_negative():
    student, teacher = random_logits(3, 6, 1), random_logits(3, 6, 2)
    q = student.softmax(1)
    for kind in ("k1", "k3"):
        average = (q * every_token(kind, student, teacher)).sum(1)
        torch.testing.assert_close(average, losses.reverse_kl(student, teacher))
    assert (every_token("k3", student, teacher) >= 0).all()


def test_the_gradients_average_to_zero_reverse_and_forward_kl():
    student, teacher = random_logits(3, 6, 1), random_logits(3, 6, 2)
    q = student.softmax(1).detach()
    averages = {
        kind: gradient(lambda s, k=kind: q * every_token(k, s, teacher), student) for kind in ("k1", "k2", "k3")
    }
    torch.testing.assert_close(averages["k1"], torch.zeros_like(student))
    torch.testing.assert_close(averages["k2"], gradient(lambda s: losses.reverse_kl(s, teacher), student))
    torch.testing.assert_close(averages["k3"], gradient(lambda s: losses.forward_kl(s, teacher), student))

    def policy_form(s):
        log_q = s.log_softmax(1)
        return q * (log_q - teacher.log_softmax(1)).detach() * log_q

    torch.testing.assert_close(gradient(policy_form, student), averages["k2"])


def test_sampled_tokens_give_the_reverse_kl_gradient_on_average():
    student, teacher = random_logits(1, 5, 1), random_logits(1, 5, 2)
    draws = torch.multinomial(student.softmax(1)[0], 200_000, True, generator=torch.Generator().manual_seed(0))

    def sampled(kind):
        def loss(s):
            own, other = s.log_softmax(1)[0, draws], teacher.log_softmax(1)[0, draws]
            return losses.kl_estimate(own, other, kind) / len(draws)

        return gradient(loss, student)

    exact = gradient(lambda s: losses.reverse_kl(s, teacher), student)
    torch.testing.assert_close(sampled("k2"), exact, atol=0.02, rtol=0)
    torch.testing.assert_close(sampled("k1"), torch.zeros_like(exact), atol=0.02, rtol=0)


def test_the_estimates_are_not_clamped_and_the_teacher_learns_nothing():
    teacher = torch.tensor([10.0], requires_grad=True)
    value = losses.kl_estimate(torch.tensor([0.0], requires_grad=True), teacher, "k3")
    value.backward()
    assert value.item() > 20_000
    assert teacher.grad is None


def test_an_unknown_estimate_is_refused():
    with pytest.raises(InputError, match="'k4'; give 'k1', 'k2' or 'k3'"):
        losses.kl_estimate(torch.zeros(1), torch.zeros(1), "k4")
