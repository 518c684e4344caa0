"""The expected gradient of MiniLLM, by enumeration of every sequence of a tiny language model.

Three tokens, one of which ends the sequence, at most four of them: 31 sequences over 15 prefixes. Student and teacher
are tables of logits, one row a prefix, so the gradient of the sequence-level KL(q‖p) is known exactly.
"""

import itertools
import math
import statistics

import numpy as np
import pytest
import torch
from loss_cases import gradient, random_logits

from rayk import losses

VOCAB, LENGTH, END = 3, 4, 0
PREFIXES = [
    prefix for size in range(LENGTH) for prefix in itertools.product([v for v in range(VOCAB) if v != END], repeat=size)
]
SEQUENCES = [
    (*prefix, token) for prefix in PREFIXES for token in range(VOCAB) if token == END or len(prefix) == LENGTH - 1
]


def padded(values, fill):
    return torch.tensor([[*row, *[fill] * (LENGTH - len(row))] for row in values])


TOKENS = padded(SEQUENCES, END)
CONTEXTS = padded([[PREFIXES.index(row[:t]) for t in range(len(row))] for row in SEQUENCES], 0)
COUNTED = padded([[True] * len(row) for row in SEQUENCES], False)


def tables(seed=0, scale=0.7):
    """The student's and the teacher's logits, [prefixes, vocab]."""
    return random_logits(len(PREFIXES), VOCAB, seed, scale), random_logits(len(PREFIXES), VOCAB, seed + 1000, scale)


def of_sampled(log_probs):
    return log_probs[CONTEXTS, TOKENS]


def sequence_probabilities(student, teacher, alpha):
    mixture = alpha * teacher.softmax(1) + (1 - alpha) * student.softmax(1)
    return torch.where(COUNTED, of_sampled(mixture.log()), 0.0).sum(1).exp().detach()


def sequence_kl(student, teacher):
    """KL(q‖p) over whole sequences, differentiable through everything."""
    log_q, log_p = (torch.where(COUNTED, of_sampled(table.log_softmax(1)), 0.0).sum(1) for table in (student, teacher))
    return log_q.exp() @ (log_q - log_p)


def expected_gradient(per_token_loss, student, teacher, alpha):
    """The average gradient of a loss (log_q, log_p, reverse_kl, log_weights) -> [rows, length], summed over tokens."""
    probabilities = sequence_probabilities(student, teacher, alpha)

    def expected_loss(leaf):
        log_q, log_p = of_sampled(leaf.log_softmax(1)), of_sampled(teacher.log_softmax(1))
        log_weights = losses.importance_log_weights(log_q, log_p, alpha)
        per_token = per_token_loss(log_q, log_p, losses.reverse_kl(leaf, teacher)[CONTEXTS], log_weights)
        return probabilities @ torch.where(COUNTED, per_token, 0.0).sum(1)

    return gradient(expected_loss, student)


def unbiased(log_q, log_p, reverse_kl, log_weights):
    return losses.unbiased_sequence_kl_loss(log_q, log_p, reverse_kl, COUNTED, log_weights=log_weights)


def test_all_sequences_are_enumerated():
    assert len(SEQUENCES) == 31
    for alpha in (0.0, 0.3, 1.0):
        torch.testing.assert_close(sequence_probabilities(*tables(), alpha).sum().item(), 1.0)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_the_unbiased_loss_averages_to_the_gradient_of_the_sequence_kl(alpha, seed):
    student, teacher = tables(seed, scale=1.5)
    exact = gradient(lambda leaf: sequence_kl(leaf, teacher), student)
    assert exact.abs().max() > 0.05
    torch.testing.assert_close(expected_gradient(unbiased, student, teacher, alpha), exact, atol=1e-6, rtol=0)


def test_without_mixing_the_weights_may_be_left_out():
    student, teacher = tables()

    def unweighted(log_q, log_p, reverse_kl, _):
        return losses.unbiased_sequence_kl_loss(log_q, log_p, reverse_kl, COUNTED)

    exact = gradient(lambda leaf: sequence_kl(leaf, teacher), student)
    torch.testing.assert_close(expected_gradient(unweighted, student, teacher, 0.0), exact, atol=1e-6, rtol=0)


# The biased settings, each as the library's parts and as (single-step weight, return) of a loop over tokens. There `w`
# and `r` are plain lists of one sequence's weights and rewards, `t` counts from 0.


def long_part(log_q, log_p, log_weights=None, rewards_weight=1.0, clip=None, **options):
    rewards = rewards_weight * losses.token_rewards(log_q, log_p)
    returns = losses.returns_to_go(rewards, COUNTED, **options)
    return losses.policy_loss(log_q, log_q, returns, log_weights=log_weights, clip=clip)


def one_step(log_q, log_p, reverse_kl, log_w):
    """The paper's approximation: w_t for everything before and after t."""
    return log_w.exp() * reverse_kl + long_part(log_q, log_p, log_w, length_norm=False)


def one_step_paper(log_q, log_p, reverse_kl, log_w):
    """The paper's algorithm: the same with length norm."""
    return log_w.exp() * reverse_kl + long_part(log_q, log_p, log_w)


def product_up_to_t(log_q, log_p, reverse_kl, log_w):
    """The product the paper prints: the tokens between t and a later reward stay unweighted."""
    product = losses.cumulative_log_weights(log_w, COUNTED)
    return product.exp() * reverse_kl + long_part(log_q, log_p, product, length_norm=False)


def no_weights(log_q, log_p, reverse_kl, log_w):
    return reverse_kl + long_part(log_q, log_p, length_norm=False)


def length_norm(log_q, log_p, reverse_kl, log_w):
    """Exact except for the length norm."""
    prefix, product = (f(log_w, COUNTED) for f in (losses.prefix_log_weights, losses.cumulative_log_weights))
    return prefix.exp() * reverse_kl + long_part(log_q, log_p, rewards_weight=product.exp())


def discounted(log_q, log_p, reverse_kl, log_w):
    """Exact except for γ."""
    prefix, product = (f(log_w, COUNTED) for f in (losses.prefix_log_weights, losses.cumulative_log_weights))
    options = {"length_norm": False, "discount": 0.95}
    return prefix.exp() * reverse_kl + long_part(log_q, log_p, rewards_weight=product.exp(), **options)


def lmops(log_q, log_p, reverse_kl, log_w):
    """As shipped, without the whitening: r_t in its own return, the weight inside the clip, none on the single step."""
    return reverse_kl + long_part(log_q, log_p, log_w, clip=0.2, include_current=True, discount=0.95)


def lmops_clipped(t, w, r):
    value = sum(0.95 ** (s - t) * r[s] for s in range(t, len(r))) / (len(r) - t)
    is_clipped = w[t] > 1.2 if value > 0 else w[t] < 0.8
    return 0.0 if is_clipped else w[t] * value


BIASED = {
    one_step: (lambda t, w: w[t], lambda t, w, r: w[t] * sum(r[t + 1 :])),
    one_step_paper: (lambda t, w: w[t], lambda t, w, r: w[t] * sum(r[t + 1 :]) / max(len(r) - t - 1, 1)),
    product_up_to_t: (
        lambda t, w: math.prod(w[: t + 1]),
        lambda t, w, r: math.prod(w[: t + 1]) * sum(r[t + 1 :]),
    ),
    no_weights: (lambda t, w: 1.0, lambda t, w, r: sum(r[t + 1 :])),
    length_norm: (
        lambda t, w: math.prod(w[:t]),
        lambda t, w, r: sum(math.prod(w[: s + 1]) * r[s] for s in range(t + 1, len(r))) / max(len(r) - t - 1, 1),
    ),
    discounted: (
        lambda t, w: math.prod(w[:t]),
        lambda t, w, r: sum(math.prod(w[: s + 1]) * r[s] * 0.95 ** (s - t - 1) for s in range(t + 1, len(r))),
    ),
    lmops: (lambda t, w: 1.0, lmops_clipped),
}


def naive_expected_gradient(setting, student, teacher, alpha):
    """Sequence by sequence, token by token, with the softmax's gradient written out."""
    single_weight, long_return = BIASED[setting]
    q, p = student.softmax(1).numpy(), teacher.softmax(1).numpy()
    result = np.zeros_like(q)
    for sequence in SEQUENCES:
        at = [PREFIXES.index(sequence[:t]) for t in range(len(sequence))]
        own, other = (
            [q[c, y] for c, y in zip(at, sequence, strict=True)],
            [p[c, y] for c, y in zip(at, sequence, strict=True)],
        )
        mixed = [alpha * b + (1 - alpha) * a for a, b in zip(own, other, strict=True)]
        w = [a / m for a, m in zip(own, mixed, strict=True)]
        r = [math.log(b / a) for a, b in zip(own, other, strict=True)]
        for t, (context, token) in enumerate(zip(at, sequence, strict=True)):
            log_ratio = np.log(q[context] / p[context])
            kl_gradient = q[context] * (log_ratio - q[context] @ log_ratio)
            log_q_gradient = np.eye(VOCAB)[token] - q[context]
            step = single_weight(t, w) * kl_gradient - long_return(t, w, r) * log_q_gradient
            result[context] += math.prod(mixed) * step
    return torch.from_numpy(result)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("setting", BIASED, ids=lambda setting: setting.__name__)
def test_each_biased_setting_averages_to_its_own_expectation(setting, alpha):
    student, teacher = tables(scale=1.5)
    expected = naive_expected_gradient(setting, student, teacher, alpha)
    torch.testing.assert_close(expected_gradient(setting, student, teacher, alpha), expected, atol=1e-6, rtol=0)


def relative_bias(setting, seed):
    student, teacher = tables(seed, scale=1.0)
    exact = gradient(lambda leaf: sequence_kl(leaf, teacher), student)
    return ((expected_gradient(setting, student, teacher, 0.2) - exact).norm() / exact.norm()).item()


MEASURED = {discounted: 0.03, product_up_to_t: 0.18, one_step: 0.20, no_weights: 0.24, length_norm: 0.34}
"""Biases measured on other tables of the same size."""


def test_the_biases_have_the_order_and_size_that_were_measured():
    bias = {setting: statistics.median(relative_bias(setting, seed) for seed in range(20)) for setting in BIASED}
    print({setting.__name__: f"{value:.1%}" for setting, value in bias.items()})
    assert sorted(MEASURED, key=bias.__getitem__) == list(MEASURED)
    for setting, measured in MEASURED.items():
        assert measured / 2.5 < bias[setting] < measured * 2.5, setting.__name__


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 1.0])
def test_weights_average_to_one_and_stay_below_their_bound(alpha):
    student, teacher = tables(scale=3.0)
    log_q, log_p = student.log_softmax(1), teacher.log_softmax(1)
    log_weights = losses.importance_log_weights(log_q, log_p, alpha)
    mixture = alpha * teacher.softmax(1) + (1 - alpha) * student.softmax(1)
    torch.testing.assert_close((mixture * log_weights.exp()).sum(1), torch.ones(len(PREFIXES), dtype=torch.float64))
    assert alpha == 1.0 or (log_weights <= -math.log(1 - alpha)).all()

    sequence_weights = losses.cumulative_log_weights(of_sampled(log_weights), COUNTED)[:, -1].exp()
    average = sequence_probabilities(student, teacher, alpha) @ sequence_weights
    torch.testing.assert_close(average.item(), 1.0)


def test_log_ratio_distillation_averages_to_each_tokens_own_reverse_kl():
    student, teacher = tables()
    drawn = sequence_probabilities(student, teacher, 0.0)

    def per_token(log_q, log_p, reverse_kl, _):
        return losses.log_ratio_policy_loss(log_q, log_q, log_p, coefficient=0.5)

    def half_the_reverse_kl(leaf):
        return 0.5 * drawn @ torch.where(COUNTED, losses.reverse_kl(leaf, teacher)[CONTEXTS], 0.0).sum(1)

    own = expected_gradient(per_token, student, teacher, 0.0)
    torch.testing.assert_close(own, gradient(half_the_reverse_kl, student))
    exact = gradient(lambda leaf: sequence_kl(leaf, teacher), student)
    assert (2 * own - exact).norm() > 0.1 * exact.norm()  # effects of a token on later tokens are missing
