"""dpo_loss is eq. 7 of arXiv 2305.18290, smoothed as Mitchell does, on the log-probs of whole answers."""

import math

import pytest
import torch
from torch.nn import functional as F

from rayk.errors import InputError
from rayk.losses import dpo_loss, implicit_rewards, sequence_sum

SETTINGS = pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.0), (0.1, 0.2), (2.0, 0.0), (0.7, 0.49)])


def answers(pairs=6, seed=0, dtype=torch.float32):
    """Log-probs of chosen and rejected answers, the student's and the reference's."""
    generator = torch.Generator().manual_seed(seed)
    return [-20 * torch.rand(pairs, generator=generator, dtype=torch.float64).to(dtype) - 5 for _ in range(4)]


@SETTINGS
def test_the_closed_form_of_one_pair(beta, smoothing):
    chosen, rejected, reference_chosen, reference_rejected = answers(dtype=torch.float64)
    found = dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta=beta, label_smoothing=smoothing)
    for pair in range(6):
        margin = beta * ((chosen[pair] - reference_chosen[pair]) - (rejected[pair] - reference_rejected[pair])).item()
        wins = 1 / (1 + math.exp(-margin))
        assert found[pair].item() == pytest.approx(-(1 - smoothing) * math.log(wins) - smoothing * math.log(1 - wins))


@SETTINGS
def test_trls_sigmoid_loss_is_the_same_number(beta, smoothing):
    chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps = answers(seed=1)
    # DPOTrainer's loss_type "sigmoid" in its own names and order (Mitchell's cDPO, eq. 3, where smoothed).
    logratios = chosen_logps - rejected_logps
    ref_logratios = ref_chosen_logps - ref_rejected_logps
    logits = logratios - ref_logratios
    theirs = -F.logsigmoid(beta * logits) * (1 - smoothing) - F.logsigmoid(-beta * logits) * smoothing
    ours = dpo_loss(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=beta, label_smoothing=smoothing
    )
    torch.testing.assert_close(ours, theirs)


@SETTINGS
def test_the_gradient_is_that_of_finite_differences_on_both_sides(beta, smoothing):
    chosen, rejected, reference_chosen, reference_rejected = answers(dtype=torch.float64)

    def loss(chosen, rejected):
        return dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta=beta, label_smoothing=smoothing)

    assert torch.autograd.gradcheck(loss, (chosen.requires_grad_(), rejected.requires_grad_()))


@SETTINGS
def test_where_student_and_reference_are_equal_the_loss_is_log_2_and_the_gradient_known(beta, smoothing):
    chosen, rejected, *_ = answers()
    chosen.requires_grad_(), rejected.requires_grad_()
    loss = dpo_loss(chosen, rejected, chosen, rejected, beta=beta, label_smoothing=smoothing)
    torch.testing.assert_close(loss, torch.full((6,), math.log(2)), rtol=0, atol=1e-7)
    loss.sum().backward()
    # −β·((1−ε)·σ(−0) − ε·σ(0)); the reference, though the same tensor, gets none of it.
    torch.testing.assert_close(chosen.grad, torch.full((6,), -beta * (0.5 - smoothing)))
    torch.testing.assert_close(rejected.grad, -chosen.grad)


def test_common_log_probs_of_both_answers_cancel():
    chosen, rejected, reference_chosen, reference_rejected = answers(dtype=torch.float64)
    loss = dpo_loss(chosen, rejected, reference_chosen, reference_rejected)
    shift = torch.linspace(-30, 30, 6, dtype=torch.float64)
    of_the_prompt = dpo_loss(chosen + shift, rejected + shift, reference_chosen, reference_rejected)
    of_both_models = dpo_loss(chosen + shift, rejected, reference_chosen + shift, reference_rejected)
    torch.testing.assert_close(of_the_prompt, loss)
    torch.testing.assert_close(of_both_models, loss)
    assert not torch.isclose(dpo_loss(chosen + 1, rejected, reference_chosen, reference_rejected), loss).any()


def test_the_smoothed_loss_is_least_at_a_finite_margin_and_the_plain_one_nowhere():
    margins, zeros = torch.linspace(-8, 8, 1601, dtype=torch.float64), torch.zeros(1601, dtype=torch.float64)
    plain = dpo_loss(margins, zeros, zeros, zeros, beta=1.0)
    smoothed = dpo_loss(margins, zeros, zeros, zeros, beta=1.0, label_smoothing=0.1)
    assert (plain.diff() < 0).all()
    assert margins[smoothed.argmin()].item() == pytest.approx(math.log(0.9 / 0.1), abs=0.01)


def test_far_margins_stay_finite_with_their_gradient():
    chosen = torch.tensor([-1e5, 1e5], requires_grad=True)
    loss = dpo_loss(chosen, torch.zeros(2), torch.zeros(2), torch.zeros(2), beta=1.0)
    torch.testing.assert_close(loss, torch.tensor([1e5, 0.0]))
    loss.sum().backward()
    torch.testing.assert_close(chosen.grad, torch.tensor([-1.0, 0.0]))


def test_half_precision_is_widened_before_it_is_subtracted():
    chosen, rejected, *references = (each.bfloat16() for each in answers())
    loss = dpo_loss(chosen, rejected, *references)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, dpo_loss(chosen.float(), rejected.float(), *(each.float() for each in references)))


def dense_answers(seed):
    """Logits [rows, length, vocab] of four sequences, their ids, and each one's (first answer token, end)."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(4, 9, 11, generator=generator)
    ids = torch.randint(0, 11, (4, 9), generator=torch.Generator().manual_seed(7))
    return logits, ids, [(3, 9), (3, 5), (2, 4), (2, 8)]


def by_hand(logits, ids, spans, shift=0):
    """log q of each answer, its tokens one by one; with a shift the wrong ones count."""
    found = []
    for row, (first, end) in enumerate(spans):
        logprobs = logits[row].log_softmax(-1)
        places = range(first + shift, end + shift)
        found.append(sum(logprobs[t - 1, ids[row, t]] for t in places if t < ids.shape[1]))
    return torch.stack(found)


def packed(logits, ids, spans, shift=0):
    """The same through `sequence_sum`, the counted tokens of all rows behind each other."""
    rows = [range(first + shift, min(end + shift, ids.shape[1])) for first, end in spans]
    per_token = [logits[row, t - 1].log_softmax(-1)[ids[row, t]] for row, places in enumerate(rows) for t in places]
    offsets = torch.tensor([0, *(len(places) for places in rows)]).cumsum(0)
    return sequence_sum(torch.stack(per_token), offsets)


def test_loss_equals_dense_logits_and_no_token_is_off_by_one():
    student, ids, spans = dense_answers(1)
    reference, *_ = dense_answers(2)

    def loss(shift):
        ours, theirs = packed(student, ids, spans, shift), packed(reference, ids, spans, shift)
        return dpo_loss(ours[0::2], ours[1::2], theirs[0::2], theirs[1::2], beta=0.3)

    ours, theirs = by_hand(student, ids, spans), by_hand(reference, ids, spans)
    expected = -torch.sigmoid(0.3 * ((ours[0::2] - theirs[0::2]) - (ours[1::2] - theirs[1::2]))).log()
    torch.testing.assert_close(loss(0), expected)
    for shift in (-1, 1):
        assert not torch.isclose(loss(shift), expected, rtol=1e-3).any()


def test_sequence_sums_skip_nothing_and_give_0_for_an_empty_sequence():
    values = torch.tensor([1.0, 2.0, 4.0, 8.0], requires_grad=True)
    sums = sequence_sum(values, torch.tensor([0, 1, 1, 4]))
    assert sums.tolist() == [1.0, 0.0, 14.0]
    (sums * torch.tensor([1.0, 5.0, 3.0])).sum().backward()
    assert values.grad.tolist() == [1.0, 3.0, 3.0, 3.0]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"beta": 0.0}, "beta is 0; give a number above 0"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5; give at least 0 and less than 0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
    ],
)
def test_settings_out_of_range_are_named(settings, sentence):
    with pytest.raises(InputError, match=sentence):
        dpo_loss(*answers(), **settings)


def test_shapes_that_would_broadcast_are_refused():
    chosen, rejected, *references = answers()
    for wrong in ((chosen[:, None], rejected, *references), (chosen[:1], rejected, references[0][:1], references[1])):
        with pytest.raises(InputError, match="one number each"):
            dpo_loss(*wrong)
    with pytest.raises(InputError, match="one number each"):
        implicit_rewards(chosen, references[0][:1], 0.1)
