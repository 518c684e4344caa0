"""The identity of decoupled KD, its form on signals, and the two groups of ATKD."""

import pytest
import torch
from loss_cases import gradient, random_logits, signals_of

from rayk import losses
from rayk.config.support import Logprob
from rayk.errors import InputError
from rayk.signals.batch import SignalBatch

N, V = 6, 11
TARGETS = torch.tensor([0, 3, 10, 5, 5, 2])


def student_and_teacher(dtype=torch.float64, scale=2.0):
    return random_logits(N, V, 1, scale, dtype), random_logits(N, V, 2, scale, dtype)


def parts(student, said, temperature=1.0):
    gold = losses.decoupled_kl(student, said, TARGETS, alpha=1.0, beta=0.0, temperature=temperature)
    return gold, losses.decoupled_kl(student, said, TARGETS, alpha=0.0, beta=1.0, temperature=temperature)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_is_tckd_plus_the_non_gold_mass_times_nckd(temperature):
    student, teacher = student_and_teacher()
    gold, others = parts(student, teacher, temperature)
    p_gold = (teacher / temperature).softmax(1).gather(1, TARGETS[:, None])[:, 0]
    torch.testing.assert_close(
        gold + (1 - p_gold) * others, losses.forward_kl(student, teacher, temperature=temperature), atol=1e-6, rtol=1e-6
    )


def test_the_default_weights_are_one_and_eight():
    student, teacher = student_and_teacher()
    gold, others = parts(student, teacher)
    torch.testing.assert_close(losses.decoupled_kl(student, teacher, TARGETS), gold + 8 * others)


def test_nckd_is_the_kl_with_the_gold_logit_taken_out():
    student, teacher = student_and_teacher()
    gone = torch.nn.functional.one_hot(TARGETS, V) * 1000.0  # the authors' way (mdistiller DKD.py)
    p, q = (teacher - gone).softmax(1), (student - gone).softmax(1)
    expected = (p * ((teacher - gone).log_softmax(1) - (student - gone).log_softmax(1))).sum(1)
    torch.testing.assert_close(parts(student, teacher)[1], expected)
    assert (q.gather(1, TARGETS[:, None]) == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_signals_of_the_whole_vocabulary_equal_dense_logits(temperature):
    student, teacher = student_and_teacher()
    signals = signals_of(teacher, V, TARGETS, (temperature,))
    for sparse, dense in zip(parts(student, signals, temperature), parts(student, teacher, temperature), strict=True):
        torch.testing.assert_close(sparse, dense)


@pytest.mark.parametrize("k", [1, 3, 6, V - 1])
def test_gold_outside_the_ids_counts_as_an_outcome_of_its_own(k):
    student, teacher = student_and_teacher()
    signals = signals_of(teacher, k, TARGETS)
    with_gold = [torch.cat([ids, gold[None]]).unique() for ids, gold in zip(signals.ids, TARGETS, strict=True)]
    sparse = parts(student, signals)
    for row, ids in enumerate(with_gold):
        own = signals_of(teacher[row : row + 1], 0, TARGETS[row : row + 1], ids=ids[None])
        for sparse_part, alone in zip(
            sparse,
            (
                losses.decoupled_kl(student[row : row + 1], own, TARGETS[row : row + 1], alpha=1.0, beta=0.0),
                losses.decoupled_kl(student[row : row + 1], own, TARGETS[row : row + 1], alpha=0.0, beta=1.0),
            ),
            strict=True,
        ):
            torch.testing.assert_close(sparse_part[row : row + 1], alone, atol=1e-6, rtol=1e-6)


def test_sparse_parts_never_exceed_the_exact_ones():
    for seed in range(20):
        student, teacher = random_logits(N, V, seed), random_logits(N, V, seed + 100)
        exact = parts(student, teacher)
        for k in (1, 4, 8):
            for sparse, dense in zip(parts(student, signals_of(teacher, k, TARGETS)), exact, strict=True):
                assert (sparse <= dense + 1e-9).all()


def test_another_temperature_needs_gold_among_the_ids():
    student, teacher = student_and_teacher()
    with pytest.raises(InputError, match="gold tokens are not among the signal's ids"):
        losses.decoupled_kl(student, signals_of(teacher, 2, TARGETS, (2.0,)), TARGETS, temperature=2.0)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_the_gradient_agrees_with_finite_differences(kind):
    student, teacher = student_and_teacher()
    said = teacher if kind == "dense" else signals_of(teacher, 4, TARGETS)
    assert torch.autograd.gradcheck(lambda s: losses.decoupled_kl(s, said, TARGETS), (student.requires_grad_(),))
    assert torch.autograd.gradcheck(lambda s: losses.adaptive_teaching(s, said, TARGETS), (student,))


def test_extreme_logits_give_finite_values_and_gradients():
    student, teacher = student_and_teacher(torch.float32)
    one_hot, masked = torch.full_like(teacher, -torch.inf), student.clone()
    one_hot[torch.arange(N), TARGETS] = 0.0
    masked[:, ::2] = -torch.inf
    for own, other in ((student * 100, teacher * 100), (student, one_hot), (masked, teacher), (one_hot, one_hot),
                       (one_hot, teacher), (student, one_hot.roll(1, 1))):  # fmt: skip
        for said in (other, signals_of(other, 3, TARGETS), signals_of(other, V, TARGETS)):
            for loss in (losses.decoupled_kl, losses.adaptive_teaching):
                leaf = own.clone().requires_grad_()
                value = loss(leaf, said, TARGETS)
                value.sum().backward()
                assert value.isfinite().all()
                assert leaf.grad.isfinite().all()


def test_teacher_with_all_mass_on_gold_gives_zero_nckd():
    student, _ = student_and_teacher(torch.float32)
    one_hot = torch.full((N, V), -torch.inf)
    one_hot[torch.arange(N), TARGETS] = 0.0
    assert (parts(student, one_hot)[1] == 0).all()


def test_easy_tokens_have_nckd_and_hard_tokens_both_terms():
    student, teacher = student_and_teacher()
    gold, others = parts(student, teacher)
    uncertainty = losses.gold_uncertainty(teacher, TARGETS)
    easy = uncertainty < uncertainty.median()
    expected = 0.2 * others[easy].mean() + 0.8 * (gold + others)[~easy].mean()
    torch.testing.assert_close(losses.adaptive_teaching(student, teacher, TARGETS).sum(), expected)


def test_micro_batches_with_global_threshold_and_counts_add_up_to_the_whole():
    student, teacher = student_and_teacher()
    uncertainty = losses.gold_uncertainty(teacher, TARGETS)
    threshold = uncertainty.median()
    counts = ((uncertainty < threshold).sum(), (uncertainty >= threshold).sum())
    whole = losses.adaptive_teaching(student, teacher, TARGETS, alpha=0.3).sum()
    cut = sum(
        losses.adaptive_teaching(
            student[part], teacher[part], TARGETS[part], alpha=0.3, threshold=threshold, counts=counts
        ).sum()
        for part in (slice(0, 1), slice(1, 6))
    )
    torch.testing.assert_close(cut, whole)


def test_an_empty_group_adds_nothing():
    student, teacher = student_and_teacher()
    all_easy = losses.adaptive_teaching(student, teacher, TARGETS, threshold=2.0)
    all_hard = losses.adaptive_teaching(student, teacher, TARGETS, threshold=-1.0)
    gold, others = parts(student, teacher)
    torch.testing.assert_close(all_easy.sum(), 0.2 * others.mean())
    torch.testing.assert_close(all_hard.sum(), 0.8 * (gold + others).mean())
    assert losses.adaptive_teaching(student[:0], teacher[:0], TARGETS[:0]).shape == (0,)


def test_uncertainty_is_one_minus_the_gold_probability_from_any_teacher():
    _, teacher = student_and_teacher()
    expected = 1 - teacher.softmax(1).gather(1, TARGETS[:, None])[:, 0]
    logprob = SignalBatch(Logprob(), torch.tensor([0, N]), teacher.log_softmax(1).gather(1, TARGETS[:, None])[:, 0], V)
    for said in (teacher, signals_of(teacher, 2, TARGETS), signals_of(teacher, V, TARGETS), logprob):
        torch.testing.assert_close(losses.gold_uncertainty(said, TARGETS), expected)


def test_confident_tokens_keep_their_order():
    teacher = torch.zeros(3, 4)
    teacher[:, 0] = torch.tensor([30.0, 31.0, 32.0])
    gold = torch.zeros(3, dtype=torch.long)
    for said in (teacher, signals_of(teacher, 2, gold)):
        uncertainty = losses.gold_uncertainty(said, gold)
        assert (uncertainty.diff() < 0).all()


def test_teacher_receives_no_gradient():
    student, teacher = student_and_teacher()
    teacher.requires_grad_()
    gradient(lambda s: losses.decoupled_kl(s, teacher, TARGETS), student)
    assert not losses.gold_uncertainty(teacher, TARGETS).requires_grad
    assert teacher.grad is None
