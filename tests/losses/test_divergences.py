"""Closed forms, gradients, extremes and the coarse-graining order of every divergence."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import gradient, random_logits, signals_of

from rayk import losses
from rayk.config.support import Logprob
from rayk.errors import InputError
from rayk.signals.batch import SignalBatch

NAMES = list(losses.DIVERGENCES)
ORDERED = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("jensen_shannon", {"beta": 0.5}),
    ("jensen_shannon", {"beta": 0.1}),
    ("total_variation", {}),
    ("symmetric_kl", {"weight": 0.3}),
    ("skew_forward_kl", {"alpha": 0.1}),
    ("skew_reverse_kl", {"alpha": 0.1}),
]
N, V = 6, 11


def student_and_teacher(dtype=torch.float64, scale=2.0):
    return random_logits(N, V, 1, scale, dtype), random_logits(N, V, 2, scale, dtype)


def by_definition(name, p, q):
    """The papers' formulas, on probabilities."""

    def kl(a, b):
        return (a * (a / b).log()).sum(1)

    return {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jensen_shannon": 0.5 * kl(p, (p + q) / 2) + 0.5 * kl(q, (p + q) / 2),
        "total_variation": (p - q).abs().sum(1) / 2,
        "symmetric_kl": 0.5 * kl(p, q) + 0.5 * kl(q, p),
        "skew_forward_kl": kl(p, 0.1 * p + 0.9 * q),
        "skew_reverse_kl": kl(q, 0.9 * p + 0.1 * q),
    }[name]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "adaptive_kl"])
def test_the_value_is_the_papers_formula(name, temperature):
    student, teacher = student_and_teacher()
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    ours = getattr(losses, name)(student, teacher, temperature=temperature)
    torch.testing.assert_close(ours, by_definition(name, p, q))


def test_two_outcome_closed_forms():
    p, q = torch.tensor([[0.8, 0.2]]), torch.tensor([[0.5, 0.5]])
    forward = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    reverse = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
    assert losses.forward_kl(q.log(), p.log()).item() == pytest.approx(forward, abs=1e-6)
    assert losses.reverse_kl(q.log(), p.log()).item() == pytest.approx(reverse, abs=1e-6)
    assert losses.total_variation(q.log(), p.log()).item() == pytest.approx(0.3, abs=1e-6)
    weighted = losses.symmetric_kl(q.log(), p.log(), weight=0.9).item()
    assert weighted == pytest.approx(0.1 * forward + 0.9 * reverse, abs=1e-6)


def test_half_jensen_shannon_is_symmetric_and_at_most_log_2():
    student, teacher = student_and_teacher(scale=30.0)
    value = losses.jensen_shannon(student, teacher)
    torch.testing.assert_close(value, losses.jensen_shannon(teacher, student))
    assert (value <= math.log(2) + 1e-12).all()


def test_jensen_shannon_tends_to_the_two_kls_and_is_them_at_the_ends():
    student, teacher = student_and_teacher()
    forward, reverse = losses.forward_kl(student, teacher), losses.reverse_kl(student, teacher)
    torch.testing.assert_close(losses.jensen_shannon(student, teacher, beta=1e-6) / 1e-6, forward, rtol=1e-3, atol=1e-4)
    near_one = losses.jensen_shannon(student, teacher, beta=1 - 1e-6) / 1e-6
    torch.testing.assert_close(near_one, reverse, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(losses.jensen_shannon(student, teacher, beta=0.0), forward)
    torch.testing.assert_close(losses.jensen_shannon(student, teacher, beta=1.0), reverse)


def test_beta_is_the_teachers_share_so_distillms_lambda_is_one_minus_it():
    student, teacher = student_and_teacher()
    p, q = teacher.softmax(1), student.softmax(1)
    mixture, lam = 0.1 * p + 0.9 * q, 0.9  # DistiLLM: M = (1−λ)p + λq
    distillm = lam * (q * (q / mixture).log()).sum(1) + (1 - lam) * (p * (p / mixture).log()).sum(1)
    torch.testing.assert_close(losses.jensen_shannon(student, teacher, beta=1 - lam), distillm)


def test_skew_kl_is_the_kl_at_alpha_0_and_vanishes_at_1():
    student, teacher = student_and_teacher()
    for skew, plain in ((losses.skew_forward_kl, losses.forward_kl), (losses.skew_reverse_kl, losses.reverse_kl)):
        torch.testing.assert_close(skew(student, teacher, alpha=0.0), plain(student, teacher))
        assert skew(student, teacher, alpha=1.0).abs().max() < 1e-12
        assert gradient(lambda s, skew=skew: skew(s, teacher, alpha=0.0), student).isfinite().all()
        assert gradient(lambda s, skew=skew: skew(s, teacher, alpha=1.0), student).abs().max() < 1e-9


def test_adaptive_kl_weighs_the_crossing_token_as_tail_and_the_top_token_as_head():
    p = torch.tensor([[0.3, 0.15, 0.25, 0.3 - 1e-3, 1e-3], [0.9, 0.05, 0.02, 0.02, 0.01]], dtype=torch.float64)
    q = torch.tensor([[0.2, 0.2, 0.2, 0.2, 0.2], [0.1, 0.3, 0.3, 0.2, 0.1]], dtype=torch.float64)
    # Row 0: 0.3 is head, 0.3 + 0.299 crosses 0.5. Row 1: the top token alone is beyond 0.5, and head all the same.
    gap = (p - q).abs()
    head, tail = gap[:, 0], gap[:, 1:].sum(1)
    forward, reverse = by_definition("forward_kl", p, q), by_definition("reverse_kl", p, q)
    expected = (head * forward + tail * reverse) / (head + tail)
    torch.testing.assert_close(losses.adaptive_kl(q.log(), p.log()), expected)


def test_adaptive_kl_counts_the_tail_bucket_as_tail_even_where_it_is_the_likeliest():
    p = torch.tensor([[0.15, 0.1, *[0.0025] * 300]], dtype=torch.float64)
    q = torch.tensor([[0.05, 0.35, *[0.002] * 300]], dtype=torch.float64)
    coarse_p, coarse_q = torch.tensor([[0.15, 0.1, 0.75]]).double(), torch.tensor([[0.05, 0.35, 0.6]]).double()
    forward, reverse = by_definition("forward_kl", coarse_p, coarse_q), by_definition("reverse_kl", coarse_p, coarse_q)
    expected = ((0.1 + 0.25) * forward + 0.15 * reverse) / 0.5
    torch.testing.assert_close(losses.adaptive_kl(q.log(), signals_of(p.log(), 2)), expected)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "adaptive_kl"])
def test_the_gradient_agrees_with_finite_differences(name, kind):
    student, teacher = student_and_teacher()
    said = teacher if kind == "dense" else signals_of(teacher, 4, temperatures=(2.0,))
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: losses.divergence(name, s, said, temperature=2.0), (student,))


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_adaptive_kl_differentiates_the_kls_and_not_their_weights(kind):
    student, teacher = student_and_teacher()
    said = teacher if kind == "dense" else signals_of(teacher, 4)
    log_p, log_q = losses.divergences.outcomes(student, said)
    p, q = log_p.exp(), log_q.exp()
    head = torch.zeros_like(p, dtype=torch.bool)
    for row in range(N):
        mass = 0.0
        order = p[row, : 4 if kind == "sparse" else V].argsort(descending=True)
        for rank, place in enumerate(order):
            mass += p[row, place].item()
            head[row, place] = rank == 0 or mass <= 0.5
    weight = ((p - q).abs() * head).sum(1) / (p - q).abs().sum(1)

    def frozen(s):
        return weight * losses.forward_kl(s, said) + (1 - weight) * losses.reverse_kl(s, said)

    torch.testing.assert_close(losses.adaptive_kl(student, said), frozen(student))
    ours = gradient(lambda s: losses.adaptive_kl(s, said), student)
    torch.testing.assert_close(ours, gradient(frozen, student))


@pytest.mark.parametrize("name", NAMES)
def test_a_student_equal_to_its_teacher_is_at_zero(name):
    for scale in (0.1, 3.0, 300.0):
        logits = random_logits(64, 4000, 3, scale, torch.float32)
        for said in (logits, signals_of(logits, 20)):
            value = losses.divergence(name, logits, said)
            assert value.min() >= -1e-6
            # A signal's tail is summed in another order than the student's.
            assert value.abs().max() < 1e-5


def extremes():
    student, teacher = student_and_teacher(torch.float32)
    masked_student, masked_teacher, one_hot = student.clone(), teacher.clone(), torch.full_like(teacher, -torch.inf)
    masked_student[:, ::2], masked_teacher[:, 1::3] = -torch.inf, -torch.inf
    one_hot[:, 3] = 0.0
    return {
        "both x100": (student * 100, teacher * 100),
        "both x10000": (student * 1e4, teacher * 1e4),
        "student masked": (masked_student, teacher),
        "teacher masked": (student, masked_teacher),
        "both masked": (masked_student, masked_teacher),
        "one-hot teacher": (student, one_hot),
        "one-hot both": (one_hot, one_hot.roll(1, 1)),
        "same one-hot": (one_hot, one_hot),
    }


@pytest.mark.parametrize("case", extremes())
@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits_give_finite_values_and_gradients(name, case):
    student, teacher = extremes()[case]
    for said in (teacher, signals_of(teacher, 3), signals_of(teacher, V)):
        student = student.detach().requires_grad_()
        value = losses.divergence(name, student, said)
        value.sum().backward()
        assert value.isfinite().all()
        assert student.grad.isfinite().all()
        assert (value >= -1e-4).all()


def test_a_masked_token_costs_the_floor_and_no_more():
    student = torch.tensor([[0.0, -torch.inf]])
    teacher = torch.tensor([[-torch.inf, 0.0]])
    assert losses.forward_kl(student, teacher).item() == pytest.approx(-losses.LOG_FLOOR)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_logits_are_computed_in_float32(name):
    student, teacher = student_and_teacher(torch.bfloat16)
    value = losses.divergence(name, student.requires_grad_(), teacher)
    value.sum().backward()
    assert value.dtype == torch.float32
    assert student.grad.dtype == torch.bfloat16
    torch.testing.assert_close(value, losses.divergence(name, student.float(), teacher.float()))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "adaptive_kl"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_signals_of_the_whole_vocabulary_equal_dense_logits(name, temperature):
    student, teacher = student_and_teacher()
    signals = signals_of(teacher, V, temperatures=(temperature,))
    sparse = losses.divergence(name, student, signals, temperature=temperature)
    torch.testing.assert_close(sparse, losses.divergence(name, student, teacher, temperature=temperature))
    torch.testing.assert_close(
        gradient(lambda s: losses.divergence(name, s, signals, temperature=temperature), student),
        gradient(lambda s: losses.divergence(name, s, teacher, temperature=temperature), student),
    )


def test_adaptive_kl_of_the_whole_vocabulary_equals_dense_logits():
    student, teacher = student_and_teacher()
    torch.testing.assert_close(
        losses.adaptive_kl(student, signals_of(teacher, V)), losses.adaptive_kl(student, teacher)
    )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocab=st.integers(3, 40),
    scale=st.sampled_from([0.3, 2.0, 10.0]),
    temperature=st.sampled_from([1.0, 2.0]),
    data=st.data(),
)
def test_smaller_support_never_gives_a_larger_divergence(seed, vocab, scale, temperature, data):
    """Sparse ≤ dense, monotone in nested supports, equal at S = V, for any ids, not only the top."""
    student, teacher = random_logits(4, vocab, seed, scale), random_logits(4, vocab, seed + 1, scale)
    large = data.draw(st.integers(2, vocab - 1))
    small = data.draw(st.integers(1, large - 1))
    ids = random_logits(4, vocab, seed + 2).argsort(1)
    for name, options in ORDERED:
        values = [
            losses.divergence(
                name,
                student,
                signals_of(teacher, 0, None, (temperature,), ids[:, :k]),
                temperature=temperature,
                **options,
            )
            for k in (small, large, vocab)
        ]
        dense = losses.divergence(name, student, teacher, temperature=temperature, **options)
        assert (values[0] <= values[1] + 1e-9).all()
        assert (values[1] <= dense + 1e-9).all()
        torch.testing.assert_close(values[2], dense)


def test_the_tail_bucket_gives_the_exact_gradient_on_the_ids_and_renormalising_does_not():
    student, teacher = student_and_teacher()
    signals = signals_of(teacher, 4)
    exact = gradient(lambda s: losses.forward_kl(s, teacher), student).gather(1, signals.ids)
    bucket = gradient(lambda s: losses.forward_kl(s, signals), student).gather(1, signals.ids)
    torch.testing.assert_close(bucket, exact)
    p = signals.logprobs.softmax(1)
    biased = gradient(lambda s: -(p * s.log_softmax(1).gather(1, signals.ids)).sum(1), student).gather(1, signals.ids)
    assert (biased - exact).abs().max() > 1e-2


def test_a_tail_far_below_the_ids_is_small_and_not_gone():
    student = torch.tensor([[0.0, -200.0, -201.0]])
    teacher = torch.tensor([[0.0, -3.0, -4.0]])
    signals = signals_of(teacher, 1)
    tail = teacher.softmax(1)[0, 1:].sum().item()
    expected = tail * (math.log(tail) + 200 - math.log(1 + math.exp(-1))) + (1 - tail) * math.log(1 - tail)
    assert losses.forward_kl(student, signals).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_student_with_a_padded_vocabulary_reads_the_teacher_as_zero_there(name):
    student, teacher = student_and_teacher(torch.float32)
    padded = torch.cat([teacher[:, :8], torch.full((N, V - 8), -torch.inf)], 1)
    torch.testing.assert_close(
        losses.divergence(name, student, teacher[:, :8]), losses.divergence(name, student, padded)
    )
    whole = losses.divergence(name, student, signals_of(teacher[:, :8], 8))
    assert whole.isfinite().all()


def test_teacher_receives_no_gradient():
    student, teacher = student_and_teacher()
    teacher.requires_grad_()
    for name in NAMES:
        losses.divergence(name, student.requires_grad_(), teacher).sum().backward()
    assert teacher.grad is None


def test_no_tokens_is_an_empty_result():
    assert losses.jensen_shannon(torch.zeros(0, 5), torch.zeros(0, 5)).shape == (0,)


def test_wrong_input_is_refused_in_a_sentence():
    student, teacher = student_and_teacher(torch.float32)
    with pytest.raises(InputError, match="vocabulary has 12 tokens but the student's logits only 11"):
        losses.forward_kl(student, random_logits(N, 12))
    with pytest.raises(InputError, match="values are for 5 tokens but the student's for 6"):
        losses.forward_kl(student, teacher[:5])
    with pytest.raises(InputError, match="vocabulary has 12 tokens"):
        losses.forward_kl(student, signals_of(random_logits(N, 12), 3))
    with pytest.raises(InputError, match="does not contain temperature 2"):
        losses.forward_kl(student, signals_of(teacher, 3), temperature=2.0)
    with pytest.raises(InputError, match="'logprob' signal has no top-k distribution"):
        losses.reverse_kl(student, SignalBatch(Logprob(), torch.tensor([0, N]), torch.zeros(N), V))
    with pytest.raises(InputError, match="temperature is 0"):
        losses.forward_kl(student, teacher, temperature=0.0)
    with pytest.raises(InputError, match="did you mean 'forward_kl'"):
        losses.divergence("foward_kl", student, teacher)
    with pytest.raises(InputError, match="no option 'betta'; did you mean 'beta'"):
        losses.divergence("jensen_shannon", student, teacher, betta=0.1)
    with pytest.raises(InputError, match="no option 'alpha'; it has none"):
        losses.divergence("forward_kl", student, teacher, alpha=0.1)
    with pytest.raises(InputError, match=r"'beta' of 'jensen_shannon' is 1\.5"):
        losses.jensen_shannon(student, teacher, beta=1.5)
