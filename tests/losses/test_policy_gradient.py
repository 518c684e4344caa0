"""Each part of the policy gradients equals loops and numpy, with any padding, in any micro-batches, at extremes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import gradient

from rayk import losses
from rayk.errors import InputError

# Left padding, right padding, a full row, one token, a hole, and a row in which nothing counts.
COUNTED = torch.tensor(
    [[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0], [1, 0, 1, 0, 1], [0, 0, 0, 0, 0]]
).bool()


def random_logprobs(shape, seed=0, dtype=torch.float64):
    return -torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) * 3


def random_rewards(seed=0):
    return random_logprobs(COUNTED.shape, seed) - random_logprobs(COUNTED.shape, seed + 1)


# Rewards and returns


def test_rewards_are_the_log_ratio_scaled_and_then_clipped():
    student, teacher = torch.tensor([-3.0, -1.0, -2.0]), torch.tensor([-1.0, -1.1, -4.0])
    torch.testing.assert_close(losses.token_rewards(student, teacher), torch.tensor([2.0, -0.1, -2.0]))
    doubled = losses.token_rewards(student, teacher, scaling=0.5, clip=1.0)
    torch.testing.assert_close(doubled, torch.tensor([1.0, -0.2, -1.0]))


def test_rewards_of_bfloat16_are_subtracted_in_float32():
    student, teacher = torch.tensor([-1.0], dtype=torch.bfloat16), torch.tensor([-1.0078125], dtype=torch.bfloat16)
    rewards = losses.token_rewards(student, teacher)
    assert rewards.dtype == torch.float32
    assert rewards.item() == pytest.approx(-0.0078125)


def naive_returns(rewards, counted, include_current, discount, length_norm):
    result = np.zeros(counted.shape)
    for row in range(len(counted)):
        places = np.flatnonzero(counted[row])
        for t, place in enumerate(places):
            summed = places[t:] if include_current else places[t + 1 :]
            value = sum(discount**k * rewards[row, s] for k, s in enumerate(summed))
            result[row, place] = value / max(len(summed), 1) if length_norm else value
    return result


@pytest.mark.parametrize("length_norm", [False, True])
@pytest.mark.parametrize("discount", [1.0, 0.95, 0.0])
@pytest.mark.parametrize("include_current", [False, True])
def test_returns_equal_a_loop_over_counted_tokens(include_current, discount, length_norm):
    rewards, options = random_rewards(), (include_current, discount, length_norm)
    own = losses.returns_to_go(
        rewards, COUNTED, include_current=include_current, discount=discount, length_norm=length_norm
    )
    np.testing.assert_allclose(own.numpy(), naive_returns(rewards.numpy(), COUNTED.numpy(), *options), atol=1e-12)


def test_the_papers_return_is_the_mean_of_later_rewards_and_zero_at_the_end():
    returns = losses.returns_to_go(torch.tensor([[9.0, 1.0, 2.0, 6.0]]), torch.ones(1, 4).bool())
    torch.testing.assert_close(returns, torch.tensor([[3.0, 4.0, 6.0, 0.0]]))


def test_lmops_return_divides_by_the_remaining_tokens_including_the_current_one():
    returns = losses.returns_to_go(
        torch.tensor([[4.0, 2.0, 0.0, 7.0]]),
        torch.tensor([[True, True, True, False]]),
        include_current=True,
        discount=0.5,
    )
    torch.testing.assert_close(returns, torch.tensor([[5.0 / 3, 1.0, 0.0, 0.0]]))


def test_long_returns_keep_their_precision():
    rewards = random_logprobs((1, 10_000), dtype=torch.float32)
    everything = torch.ones(1, 10_000).bool()
    options = {"include_current": True, "discount": 0.95}
    wide = losses.returns_to_go(rewards.double(), everything, **options)
    torch.testing.assert_close(losses.returns_to_go(rewards, everything, **options).double(), wide, atol=0, rtol=1e-5)


# Weights


def test_products_of_weights_run_over_counted_tokens_up_to_and_before_each():
    log_weights = random_rewards(3)
    up_to, before = (
        part(log_weights, COUNTED).exp().numpy() for part in (losses.cumulative_log_weights, losses.prefix_log_weights)
    )
    weights = log_weights.exp().numpy()
    for row, place in np.argwhere(COUNTED.numpy()):
        earlier = [s for s in range(place) if COUNTED[row, s]]
        assert before[row, place] == pytest.approx(np.prod(weights[row, earlier]))
        assert up_to[row, place] == pytest.approx(np.prod(weights[row, [*earlier, place]]))


def test_token_with_zero_student_probability_keeps_its_exact_weight():
    student, teacher = torch.tensor([-200.0, -300.0]), torch.tensor([-1.0, -2.0])  # e^-200 is 0 in float32
    log_weights = losses.importance_log_weights(student, teacher, 0.2)
    expected = student - (torch.tensor(0.2).log() + teacher)
    torch.testing.assert_close(log_weights, expected)
    ratio = -losses.policy_loss(student + 199, student, torch.ones(2), log_weights=log_weights)
    torch.testing.assert_close(ratio, (expected + 199).exp())


def test_the_bound_holds_in_float32_however_unlikely_the_token():
    student = torch.tensor([-1e4, -50.0, 0.0, -torch.inf, -torch.inf])
    teacher = torch.tensor([-torch.inf, -1e4, -torch.inf, -torch.inf, 0.0])
    log_weights = losses.importance_log_weights(student, teacher, 0.2)
    assert (log_weights <= torch.tensor(1 / 0.8).log() + 1e-7).all()
    assert log_weights.isfinite().all()


# Whitening


def test_whitening_equals_numpy_over_counted_values():
    values = random_rewards() * 7 + 3
    chosen = values[COUNTED].numpy()
    own = losses.whiten(values, losses.moment_sums(values, COUNTED))[COUNTED].numpy()
    np.testing.assert_allclose(own, (chosen - chosen.mean()) / np.sqrt(chosen.var() + 1e-8))
    assert own.mean() == pytest.approx(0.0, abs=1e-9)
    assert own.std() == pytest.approx(1.0)


def test_lmops_whitening_counts_padding_as_zeros():
    values = random_rewards() * 7 + 3
    padded = torch.where(COUNTED, values, 0.0).numpy()
    own = losses.whiten(values, losses.moment_sums(values, COUNTED, include_padding=True))[COUNTED].numpy()
    np.testing.assert_allclose(own, ((padded - padded.mean()) / np.sqrt(padded.var() + 1e-8))[COUNTED.numpy()])


def test_sums_of_micro_batches_add_up_to_those_of_the_whole():
    values = random_rewards()
    for include_padding in (False, True):
        whole = losses.moment_sums(values, COUNTED, include_padding=include_padding)
        parts = sum(
            losses.moment_sums(values[cut], COUNTED[cut], include_padding=include_padding)
            for cut in (slice(0, 1), slice(1, 5), slice(5, 6))
        )
        torch.testing.assert_close(parts, whole)


def test_whitening_far_from_zero_keeps_the_spread():
    values = torch.tensor([10_000.0, 10_000.5, 10_001.0])
    whitened = losses.whiten(values, losses.moment_sums(values, torch.ones(3).bool()))
    torch.testing.assert_close(whitened, torch.tensor([-1.0, 0.0, 1.0]) * 1.5**0.5, atol=1e-4, rtol=0)


def test_whitening_one_value_or_none_is_zero_and_not_nan():
    one = torch.tensor([5.0])
    assert losses.whiten(one, losses.moment_sums(one, torch.ones(1).bool())).item() == 0.0
    assert losses.whiten(torch.zeros(2), losses.moment_sums(one, torch.zeros(1).bool())).tolist() == [0.0, 0.0]


def test_whitening_equal_values_is_zero_though_rounding_makes_their_variance_negative():
    equal = torch.full((7,), 5e6 / 7, dtype=torch.float64)
    sums = losses.moment_sums(equal, torch.ones(7).bool())
    assert sums[2] / 7 - (sums[1] / 7) ** 2 < -1e-8
    torch.testing.assert_close(losses.whiten(equal, sums), torch.zeros_like(equal), atol=1e-4, rtol=0)


# Policy losses


@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_policy_loss_equals_a_loop(clip):
    rollout, advantages, log_weights = random_logprobs((400,), 1), random_logprobs((400,), 2) + 1.5, random_rewards(3)
    log_weights = log_weights.flatten().repeat(14)[:400] * 0.1
    student = rollout + (random_logprobs((400,), 4) + 1.5) * 0.3
    values, gradients = [], []
    for new, old, advantage, log_weight in zip(student, rollout, advantages, log_weights, strict=True):
        ratio = float((new - old + log_weight).exp())
        unclipped = -float(advantage) * ratio
        clipped = unclipped if clip is None else -float(advantage) * min(max(ratio, 1 - clip), 1 + clip)
        values.append(max(unclipped, clipped))
        gradients.append(0.0 if clipped > unclipped else unclipped)
    assert clip is None or 50 < gradients.count(0.0) < 350

    def loss(leaf):
        return losses.policy_loss(leaf, rollout, advantages, log_weights=log_weights, clip=clip)

    np.testing.assert_allclose(loss(student).numpy(), values)
    np.testing.assert_allclose(gradient(loss, student).numpy(), gradients)


def test_the_weight_sits_inside_the_clip():
    logprob, log_weight = torch.tensor([-1.0]), torch.tensor([1.25]).log()
    loss = losses.policy_loss(logprob, logprob, torch.tensor([2.0]), log_weights=log_weight, clip=0.2)
    assert loss.item() == pytest.approx(-2 * 1.2)


def test_log_ratio_advantage_uses_the_student_that_sampled():
    student, rollout, teacher = (random_logprobs((6,), seed) for seed in (1, 2, 3))
    expected = 0.7 * (rollout - teacher) * (student - rollout).exp()
    torch.testing.assert_close(losses.log_ratio_policy_loss(student, rollout, teacher, coefficient=0.7), expected)
    clipped = losses.log_ratio_policy_loss(student, rollout, teacher, clip=0.2)
    torch.testing.assert_close(clipped, losses.policy_loss(student, rollout, teacher - rollout, clip=0.2))
    assert not torch.equal(clipped, losses.log_ratio_policy_loss(student, rollout, teacher))


def test_only_the_student_receives_gradients():
    student, rollout, teacher, advantages, log_weights = (
        random_logprobs((4,), seed).requires_grad_() for seed in range(5)
    )
    losses.policy_loss(student, rollout, advantages, log_weights=log_weights).sum().backward()
    losses.log_ratio_policy_loss(student, rollout, teacher).sum().backward()
    rewards = losses.token_rewards(student, teacher)
    assert not rewards.requires_grad
    assert not losses.importance_log_weights(student, teacher, 0.2).requires_grad
    assert student.grad.abs().min() > 0
    assert all(other.grad is None for other in (rollout, teacher, advantages, log_weights))


# The whole of it, on rows


def full_loss(student, teacher, reverse_kl, counted):
    """MiniLLM's loss with all of its parts, one value per counted token."""
    rollout = student.detach() - 0.05
    log_weights = losses.importance_log_weights(rollout, teacher, 0.2)
    rewards = losses.token_rewards(rollout, teacher)
    returns = losses.returns_to_go(rewards, counted)
    advantages = losses.whiten(returns, losses.moment_sums(returns, counted))
    product = losses.cumulative_log_weights(log_weights, counted)
    long_part = losses.policy_loss(student, rollout, advantages, log_weights=product, clip=0.2)
    return (losses.prefix_log_weights(log_weights, counted).exp() * reverse_kl + long_part)[counted]


def unbiased_loss(student, teacher, reverse_kl, counted):
    log_weights = losses.importance_log_weights(student, teacher, 0.2)
    loss = losses.unbiased_sequence_kl_loss(student, teacher, reverse_kl, counted, log_weights=log_weights)
    assert (loss[~counted] == 0).all()
    return loss[counted]


def row_inputs(seed=0):
    return random_logprobs(COUNTED.shape, seed), random_logprobs(COUNTED.shape, seed + 1), random_rewards(seed).abs()


def spread(values, places, length, fill):
    result = values.new_full((len(values), length), fill)
    result[:, places] = values
    return result


@given(st.lists(st.booleans(), max_size=8), st.integers(0, 100), st.sampled_from([torch.nan, torch.inf, -torch.inf]))
@settings(max_examples=60, deadline=None)
def test_padding_with_any_content_anywhere_changes_nothing(extra, seed, garbage):
    """Garbage columns are added before, between and after the real ones."""
    length = COUNTED.shape[1] + len(extra)
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(length, generator=generator)[: COUNTED.shape[1]].sort().values
    inputs = row_inputs(seed)
    padded = [spread(torch.where(COUNTED, values, garbage), places, length, garbage) for values in inputs]
    counted = spread(COUNTED, places, length, False)
    for loss in (full_loss, unbiased_loss):
        torch.testing.assert_close(loss(*padded, counted), loss(*inputs, COUNTED))

        def of_student(leaf, loss=loss):
            return loss(leaf, *padded[1:], counted)

        own = gradient(of_student, padded[0])[counted]
        torch.testing.assert_close(
            own, gradient(lambda s, loss=loss: loss(s, *inputs[1:], COUNTED), inputs[0])[COUNTED]
        )


@given(st.permutations(range(len(COUNTED))), st.integers(1, len(COUNTED)), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_rows_in_any_order_and_any_micro_batches_add_up_to_the_whole(order, size, seed):
    inputs, count = row_inputs(seed), int(COUNTED.sum())
    whole = losses.token_mean(unbiased_loss(*inputs, COUNTED), count)
    parts = [
        losses.token_mean(unbiased_loss(*(values[list(rows)] for values in (*inputs, COUNTED))), count)
        for rows in (order[start : start + size] for start in range(0, len(order), size))
    ]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("loss", [full_loss, unbiased_loss])
def test_a_mask_shifted_by_one_is_another_loss(loss):
    inputs = row_inputs()
    right, left = (loss(*inputs, COUNTED.roll(shift, 1)).sum() for shift in (1, -1))
    whole = loss(*inputs, COUNTED).sum()
    assert abs(right - whole) > 1e-3
    assert abs(left - whole) > 1e-3


def test_nothing_counted_and_nothing_at_all_give_zero():
    for shape in ((2, 3), (2, 0), (0, 3)):
        nothing = torch.full(shape, torch.nan)
        counted = torch.zeros(shape).bool()
        for include_current in (False, True):
            returns = losses.returns_to_go(nothing, counted, include_current=include_current)
            assert returns.shape == shape and not returns.any()
        for part in (losses.cumulative_log_weights, losses.prefix_log_weights):
            assert part(nothing, counted).shape == shape and not part(nothing, counted).any()
        assert losses.moment_sums(nothing, counted).tolist() == [0, 0, 0]
        leaf = nothing.clone().requires_grad_()
        loss = losses.token_mean(losses.unbiased_sequence_kl_loss(leaf, nothing, nothing, counted), 0)
        loss.backward()
        assert loss.item() == 0 and not leaf.grad.any()


def test_one_token_alone_has_its_single_step_part_only():
    one = torch.ones(1, 1).bool()
    student, teacher, reverse_kl = torch.tensor([[-1.0]]), torch.tensor([[-2.0]]), torch.tensor([[0.7]])
    loss = losses.unbiased_sequence_kl_loss(student, teacher, reverse_kl, one)
    torch.testing.assert_close(loss, reverse_kl)
    learnt = gradient(lambda leaf: losses.unbiased_sequence_kl_loss(leaf, teacher, reverse_kl, one), student)
    assert learnt.item() == 0


def test_impossible_tokens_give_finite_losses_and_gradients():
    student = torch.tensor([[-torch.inf, -1.0, -torch.inf, -1e5, -0.0]])
    teacher = torch.tensor([[-1.0, -torch.inf, -torch.inf, -0.0, -1e5]])
    counted = torch.ones(1, 5).bool()
    for loss in (full_loss, unbiased_loss):
        leaf = student.clone().requires_grad_()
        value = loss(leaf, teacher, torch.zeros(1, 5), counted)
        value.sum().backward()
        assert value.isfinite().all()
        assert leaf.grad.isfinite().all()
    leaf = torch.tensor([0.0]).requires_grad_()
    value = losses.policy_loss(leaf, torch.tensor([-torch.inf]), torch.tensor([1.0]))
    value.backward()
    assert value.isfinite() and leaf.grad.isfinite()


def test_a_thousand_tokens_at_the_weights_bound_do_not_overflow_float32():
    counted = torch.ones(1, 1000).bool()
    student, teacher = torch.full((1, 1000), -2.0), torch.full((1, 1000), -torch.inf)
    log_weights = losses.importance_log_weights(student, teacher, 0.2)
    assert losses.cumulative_log_weights(log_weights, counted).exp().isinf().any()
    leaf = student.clone().requires_grad_()
    loss = losses.unbiased_sequence_kl_loss(leaf, teacher, torch.ones(1, 1000), counted, log_weights=log_weights)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, m: losses.token_rewards(x, x[:, 1:]), "student_logprobs [2, 3], teacher_logprobs [2, 2]"),
        (lambda x, m: losses.token_rewards(x, x, scaling=0.0), "'scaling' is 0; give a number above 0"),
        (lambda x, m: losses.returns_to_go(x, m[:1]), "rewards [2, 3], counted [1, 3]"),
        (lambda x, m: losses.returns_to_go(x, m, discount=1.1), "'discount' is 1.1; give a number from 0 to 1"),
        (lambda x, m: losses.importance_log_weights(x, x, -0.1), "'alpha' is -0.1; give a number from 0 to 1"),
        (lambda x, m: losses.moment_sums(x, m[:, :1]), "values [2, 3], counted [2, 1]"),
        (lambda x, m: losses.policy_loss(x, x, x[:, :1]), "advantages [2, 1]"),
        (lambda x, m: losses.policy_loss(x, x, x, log_weights=x[0]), "log_weights [3]"),
        (lambda x, m: losses.policy_loss(x, x, x, clip=-0.2), "'clip' is -0.2; give a number above 0"),
        (lambda x, m: losses.unbiased_sequence_kl_loss(x, x, x, m.T), "counted [3, 2]"),
    ],
)
def test_wrong_input_is_refused_with_a_sentence_that_names_it(call, message):
    with pytest.raises(InputError) as refusal:
        call(torch.zeros(2, 3), torch.ones(2, 3).bool())
    assert message in str(refusal.value)
