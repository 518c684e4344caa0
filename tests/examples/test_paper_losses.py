"""The losses of papers that are written as a user would are the papers' formulas, and train by their paths."""

import math

import pytest
import torch

from rayk.config import parse_config
from rayk.data.batches import collate
from rayk.methods import Experience, resolve_method
from rayk.rollouts import Rollout
from rayk.run import distill
from rayk.training.student import Student
from tests import runs
from tests.examples.paper_losses import entropy_aware, logit_matching
from tests.methods.small_batch import dense_logits, small_batch
from tests.methods.test_logit_kd import signals_of
from tests.tiny import tiny_model

FILE = "tests.examples.paper_losses"


def make_method(**settings):
    base = {"student": {"model": "student"}, "data": {"train": {"path": "rows"}}, "teachers": [{"model": "teacher"}]}
    config = parse_config(base | {"method": {"kind": "custom"} | settings}).method
    return resolve_method(config)(config, None)


@pytest.fixture(scope="module")
def student():
    return Student(tiny_model(seed=3, tie=False))


def test_logit_matching_is_the_distance_of_centered_logits():
    teacher, student = torch.randn(2, 7, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = ((teacher - teacher.mean(1, keepdim=True)) - (student - student.mean(1, keepdim=True))).square().mean(1)
    torch.testing.assert_close(logit_matching(teacher.log_softmax(1), student.log_softmax(1)), expected)


def test_forward_kl_is_added_where_the_teacher_is_undecided():
    peaked, flat = torch.tensor([5.0, 0.0, 0.0]).log_softmax(0), torch.zeros(3).log_softmax(0)
    log_p, log_q = torch.stack([peaked, flat]), torch.tensor([[0.0, 1.0, 2.0]] * 2).log_softmax(1)
    forward, reverse = (log_p.exp() * (log_p - log_q)).sum(1), (log_q.exp() * (log_q - log_p)).sum(1)
    expected = torch.stack([reverse[0], reverse[1] + forward[1]])  # entropies of 0.08 and 1.10 nats
    torch.testing.assert_close(entropy_aware(log_p, log_q, threshold=0.5), expected)


@pytest.mark.parametrize("least", [0.0, 0.2])
def test_tailr_weighs_tokens_by_the_student(student, least):
    method = make_method(path=f"{FILE}:TaiLr", support=None, options={"gamma": 0.3, "least_weight": least})
    batch = small_batch()
    q = dense_logits(student.model, batch).softmax(1).gather(1, batch.targets[:, None])[:, 0]
    weight = (q / (0.3 + 0.7 * q)).clamp(min=least).detach()
    loss = method.loss(student, Experience(batch)).per_token
    torch.testing.assert_close(loss, -weight * q.log(), atol=1e-5, rtol=1e-4)
    head = student.head.weight
    expected = torch.autograd.grad((-weight * q.log()).sum(), head)[0]
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), head)[0], expected, atol=1e-5, rtol=1e-4)


def test_f_distill_measures_each_row_where_it_was_written(student):
    method = make_method(path=f"{FILE}:FDistill", rollouts=True, completions=True)
    rows = list(small_batch().sequences)
    rows[1] = Rollout(rows[1].input_ids, rows[1].counted, None, 2, "a rollout", {})
    batch = collate(rows, pad_id=0)
    teacher, ours = dense_logits(tiny_model(seed=4, peaked=3.0), batch), dense_logits(student.model, batch)
    loss = method.loss(student, Experience(batch, signals_of(teacher, batch, 1.0))).per_token
    log_p, log_q = teacher.detach().log_softmax(1), ours.log_softmax(1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    of_teacher, of_student = ((log.exp() * (log - log_m)).sum(1) for log in (log_p, log_q))
    start, end = batch.offsets[1:3].tolist()
    by_student = (torch.arange(len(loss)) >= start) & (torch.arange(len(loss)) < end)
    assert 0 < by_student.sum() < len(loss)
    torch.testing.assert_close(loss, torch.where(by_student, of_student, of_teacher), atol=1e-5, rtol=1e-4)


@pytest.mark.cluster
@pytest.mark.parametrize(
    "method",
    [
        {"kind": "logit_kd", "divergence": f"{FILE}:logit_matching", "support": {"kind": "hidden"}},
        {"kind": "on_policy", "divergence": {"name": f"{FILE}:entropy_aware", "threshold": 0.5}},
        {"kind": "custom", "path": f"{FILE}:TaiLr", "support": None, "options": {"gamma": 0.1}},
        {"kind": "custom", "path": f"{FILE}:FDistill", "rollouts": True, "completions": True},
    ],
    ids=["logit_matching", "entropy_aware", "TaiLr", "FDistill"],
)
def test_losses_of_papers_train(tmp_path, served, tiny_student, method):
    run = runs.config(tmp_path, tiny_student, method, steps=6)
    distill(run)
    # TaiLr's loss is small where the student finds everything unlikely, and rises at first.
    losses = runs.curve(tmp_path / "run", "loss" if method.get("support", True) else "cross_entropy")
    assert len(losses) == 6 and losses[-1] < losses[0]
    if method.get("rollouts"):
        assert 0 < sum(runs.curve(tmp_path / "run", "rollouts")) < 6 * run.training.batch_size
