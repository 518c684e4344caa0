"""The loss of preference equals DPO on dense logits, in any micro-batches, with the initial student as reference."""

import math

import numpy as np
import pytest
import torch

from rayk.config import PreferenceConfig
from rayk.data.batches import collate
from rayk.data.examples import Example
from rayk.errors import RunFailed
from rayk.methods import Preference
from rayk.methods.preference import Pairs
from rayk.models.packing import can_pack, enable_packing
from rayk.serving.event_loop import run_in_background, wait_for
from rayk.storage.values import join_tensors, split_tensors
from rayk.training.student import LossModule, Student
from tests.tiny import tiny_model

VOCABULARY = 384
SETTINGS = PreferenceConfig(beta=0.5, label_smoothing=0.1)


def pairs(count=5, seed=0):
    """Rows with a prompt of 3 tokens and two answers of 1 to 8 tokens."""
    random = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        prompt = random.integers(3, VOCABULARY, 3)
        sides = [np.concatenate([prompt, random.integers(3, VOCABULARY, n)]) for n in random.integers(1, 9, 2)]
        chosen, rejected = (
            Example(ids.astype(np.int32), np.arange(len(ids)) >= 3, None, 3, f"line {number}") for ids in sides
        )
        rows.append(Example(chosen.input_ids, chosen.counted, None, 3, chosen.where, rejected=rejected))
    return rows


@pytest.fixture(scope="module", params=[False, True], ids=["padded", "packed"])
def student(request):
    model = tiny_model(seed=3, peaked=2.0)
    if request.param:
        enable_packing(model)
        assert can_pack(model, 11)
    return Student(model)


@pytest.fixture(scope="module")
def reference():
    return Student(tiny_model(seed=4, peaked=2.0))


@pytest.fixture
def method(reference):
    """The method of a run whose initial student is `reference`."""
    return with_reference(Preference(SETTINGS, None), reference)


@torch.no_grad()
def with_reference(method, student, rows=None):
    answers = [answer for row in rows or pairs() for answer in row.answers]
    # Two workers, each with a share of the answers.
    shares, values = [answers[:4], answers[4:]], []
    for share in shares:
        Preference(method.settings, None).precompute(
            student, [collate(share, 0)], lambda value: values.append(value) or []
        )
    method.precompute(student, [collate(shares[0], 0)], lambda value: values)
    return method


def prepared(method, rows=None):
    return wait_for(run_in_background(method.prepare(collate(rows or pairs(), 0))))


def by_hand(model, row, shift=0):
    """log q of a row's answer from dense logits, token by token; with a shift, of the wrong tokens."""
    logits = model(input_ids=torch.tensor(row.input_ids[None], dtype=torch.long)).logits[0]
    places = range(row.prompt_tokens + shift, min(len(row) + shift, len(row)))
    logprobs = [logits[t - 1].log_softmax(0)[row.input_ids[t]] for t in places]
    return torch.stack([logits.new_zeros(()), *logprobs]).sum()


def expected_losses(student, reference, rows, shift=0):
    losses = []
    for row in rows:
        ours, theirs = ([by_hand(each.model, answer, shift) for answer in row.answers] for each in (student, reference))
        wins = torch.sigmoid(0.5 * ((ours[0] - theirs[0]) - (ours[1] - theirs[1])))
        losses.append(-0.9 * wins.log() - 0.1 * (1 - wins).log())
    return torch.stack(losses)


def test_loss_equals_dense_logits_and_no_token_is_off_by_one(student, reference, method):
    loss = method.loss(student, prepared(method)).per_token
    torch.testing.assert_close(loss, expected_losses(student, reference, pairs()), rtol=1e-4, atol=1e-5)
    for shift in (-1, 1):
        shifted = expected_losses(student, reference, pairs(), shift)
        assert not torch.isclose(loss, shifted, rtol=1e-3).any()


def gradients(student, loss):
    student.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in student.named_parameters()}


def test_gradients_of_both_answers_equal_dense_logits(student, reference, method):
    ours = gradients(student, method.loss(student, prepared(method)).per_token.sum())
    dense = gradients(student, expected_losses(student, reference, pairs()).sum())
    for name in dense:
        torch.testing.assert_close(ours[name], dense[name], rtol=1e-3, atol=1e-4, msg=name)


def test_supervised_loss_of_the_chosen_answer_is_per_token(student, reference, method):
    rows = pairs()
    beside = with_reference(Preference(SETTINGS.model_copy(update={"chosen_weight": 0.5}), None), reference)
    alone, both = (each.loss(student, prepared(each)).per_token for each in (method, beside))
    supervised = [-by_hand(student.model, row.answers[0]) / (len(row) - row.prompt_tokens) for row in rows]
    torch.testing.assert_close(both, alone + 0.5 * torch.stack(supervised), rtol=1e-4, atol=1e-5)


def test_pairs_stay_together_in_micro_batches(student, method):
    whole = prepared(method)
    assert whole.count == 5
    assert len(whole.batch.sequences) == 10
    together = method.loss(student, whole)
    for cut in ([[4, 0], [1, 3, 2]], [[0], [1], [2], [3], [4]]):
        for part in cut:
            loss = method.loss(student, whole.select(part).to("cpu"))
            torch.testing.assert_close(loss.per_token, together.per_token[part], rtol=1e-4, atol=1e-5)
            for name, term in loss.terms.items():
                torch.testing.assert_close(term, together.terms[name][part], rtol=1e-4, atol=1e-4, msg=name)


def test_length_of_a_pair_is_that_of_both_answers_padded(method):
    whole = prepared(method)
    for pair, length in enumerate(whole.lengths):
        assert length == whole.select([pair]).batch.input_ids.numel()


def test_unchanged_student_has_loss_log_2_and_prefers_neither(reference, method):
    loss = method.loss(reference, prepared(method))
    torch.testing.assert_close(loss.per_token, torch.full((5,), math.log(2)), rtol=0, atol=1e-5)
    assert loss.terms["reward_margin"].abs().max() < 1e-4


def test_metrics_describe_both_answers(student, reference, method):
    terms = method.loss(student, prepared(method)).terms
    for number, row in enumerate(pairs()):
        ours, theirs = ([by_hand(each.model, a).item() for a in row.answers] for each in (student, reference))
        rewards = [0.5 * (mine - other) for mine, other in zip(ours, theirs, strict=True)]
        expected = {
            "chosen_logprob": ours[0], "rejected_logprob": ours[1], "chosen_reward": rewards[0],
            "rejected_reward": rewards[1], "reward_margin": rewards[0] - rewards[1],
            "reward_accuracy": float(rewards[0] > rewards[1]), "chosen_tokens": len(row) - 3,
            "rejected_tokens": len(row.rejected) - 3,
        }  # fmt: skip
        assert {name: term[number].item() for name, term in terms.items()} == pytest.approx(expected, abs=1e-3)


def test_initial_log_probs_survive_a_checkpoint_bit_for_bit(student, method):
    resumed = Preference(SETTINGS, None)
    resumed.load_state_dict(join_tensors(*split_tensors(method.state_dict())))
    assert torch.equal(prepared(resumed).reference, prepared(method).reference)


def test_row_that_the_run_did_not_start_with_is_named(method):
    with pytest.raises(RunFailed, match="line 0 is not one of the rows that the run started with"):
        prepared(method, pairs(seed=1))


def test_rows_with_the_same_answers_share_their_log_probs(method, reference):
    twice = prepared(method, [pairs()[1], pairs()[1]])
    assert torch.equal(twice.reference[:2], twice.reference[2:])


def test_loss_runs_inside_the_loss_module(student, method):
    loss, terms = LossModule(student, method)(prepared(method))
    assert isinstance(prepared(method), Pairs)
    assert loss.requires_grad
    assert not any(term.requires_grad for term in terms.values())
