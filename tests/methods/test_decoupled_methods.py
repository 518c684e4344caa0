"""`decoupled_kl` and `adaptive_teaching` as divergences of a method: weights, groups over all workers, settings."""

from types import SimpleNamespace

import pytest
import torch

from rayk import losses
from rayk.config import LogitKDConfig, OnPolicyConfig, parse_config
from rayk.config.support import TopK
from rayk.data.batches import collate
from rayk.methods import Experience, LogitKD, OnPolicy
from rayk.rollouts import Rollout
from rayk.run import distill
from rayk.signals.batch import SignalBatch
from tests.methods.small_batch import VOCABULARY, dense_logits
from tests.runs import assert_same_learning, metrics, settings
from tests.tiny import tiny_model

ALONE = SimpleNamespace(gather=lambda value: [value], sums=lambda values: values)


@pytest.fixture(scope="module")
def teacher_logits(batch):
    return dense_logits(tiny_model(seed=4, peaked=3.0), batch).detach()


@pytest.fixture(scope="module")
def experience(batch, teacher_logits):
    log_p = teacher_logits.log_softmax(1)
    values, ids = log_p.topk(16, dim=1)
    tail = log_p.scatter(1, ids, -torch.inf).logsumexp(1)
    target = log_p.gather(1, batch.targets[:, None])[:, 0]
    return Experience(batch, SignalBatch(TopK(16), batch.offsets, target, VOCABULARY, ids, values, tail[:, None]))


def method_with(divergence, **settings):
    return LogitKD(LogitKDConfig(divergence=divergence, support={"kind": "topk", "k": 16}, **settings), None)


def loss_after(method, experience, student, step=0):
    return method.loss(student, method.synchronize(experience, ALONE, step))


def test_decoupled_kl_is_the_loss_function_of_the_same_name(student, batch, experience):
    method = method_with({"name": "decoupled_kl", "alpha": 1.5, "beta": 4.0}, hard_label_weight=0.25)
    loss = loss_after(method, experience, student)
    ours = dense_logits(student.model, batch)
    soft = losses.decoupled_kl(ours, experience.signals, batch.targets, alpha=1.5, beta=4.0)
    hard = -ours.log_softmax(1).gather(1, batch.targets[:, None])[:, 0]
    torch.testing.assert_close(loss.per_token, 0.25 * hard + 0.75 * soft, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss.terms["cross_entropy"], hard, rtol=1e-4, atol=1e-5)


def test_defaults_are_the_papers(student, batch, experience):
    soft = losses.decoupled_kl(dense_logits(student.model, batch), experience.signals, batch.targets)
    loss = loss_after(method_with("decoupled_kl"), experience, student)
    torch.testing.assert_close(loss.per_token, soft, rtol=1e-4, atol=1e-5)


def test_warm_up_grows_linearly_to_one(student, experience):
    method = method_with({"name": "decoupled_kl", "warmup_steps": 4})
    whole = loss_after(method_with("decoupled_kl"), experience, student).per_token
    for step, weight in ((0, 0.25), (1, 0.5), (3, 1.0), (9, 1.0)):
        torch.testing.assert_close(loss_after(method, experience, student, step).per_token, weight * whole)


@pytest.mark.parametrize("alpha", [None, 0.3])
def test_the_mean_of_adaptive_teaching_is_the_papers_loss(student, batch, experience, alpha):
    options = {} if alpha is None else {"alpha": alpha}
    loss = loss_after(method_with({"name": "adaptive_teaching", **options}), experience, student)
    expected = losses.adaptive_teaching(
        dense_logits(student.model, batch), experience.signals, batch.targets, **options
    )
    torch.testing.assert_close(loss.per_token.mean(), expected.sum(), rtol=1e-4, atol=1e-5)


def test_groups_are_those_of_all_workers_and_micro_batches(student, experience):
    method = method_with("adaptive_teaching")
    whole = loss_after(method, experience, student).per_token
    parts = [experience.select(rows) for rows in ([0], [1, 2])]
    uncertainties = [losses.gold_uncertainty(part.signals, part.batch.targets) for part in parts]
    workers = SimpleNamespace(gather=lambda _: uncertainties)
    shares = [method.synchronize(part, workers, 0) for part in parts]
    found = [
        method.loss(student, share).per_token for share in (shares[0], shares[1].select([0]), shares[1].select([1]))
    ]
    torch.testing.assert_close(torch.cat(found), whole, rtol=1e-4, atol=1e-5)


def test_a_group_without_tokens_adds_nothing(student, experience):
    """If all tokens are equally uncertain, none is below the median."""
    row = experience.select([0])
    columns = method_with("adaptive_teaching").synchronize(row, SimpleNamespace(gather=lambda _: [torch.ones(3)]), 0)
    loss = method_with("adaptive_teaching").loss(student, columns)
    assert loss.per_token.isfinite().all()
    assert columns.columns["soft_weight"].max() <= 3 * 0.8


def test_an_equal_teacher_has_no_loss(student, batch):
    log_p = dense_logits(student.model, batch).detach().log_softmax(1)
    values, ids = log_p.topk(16, dim=1)
    tail = log_p.scatter(1, ids, -torch.inf).logsumexp(1)
    target = log_p.gather(1, batch.targets[:, None])[:, 0]
    signals = SignalBatch(TopK(16), batch.offsets, target, VOCABULARY, ids, values, tail[:, None])
    for name in ("decoupled_kl", "adaptive_teaching"):
        assert loss_after(method_with(name), Experience(batch, signals), student).per_token.abs().max() < 1e-4


def test_hard_labels_on_policy_count_in_rows_that_the_student_did_not_generate(student, batch, experience):
    rows = list(batch.sequences)
    rows[1] = Rollout(rows[1].input_ids, rows[1].counted)
    mixed = Experience(collate(rows, 0), experience.signals)
    settings = {"student_fraction": 0.5, "support": {"kind": "topk", "k": 16}}
    soft, half = (
        OnPolicy(OnPolicyConfig(hard_label_weight=weight, **settings), None).loss(student, mixed)
        for weight in (0.0, 0.5)
    )
    own = torch.zeros(batch.counted_tokens, dtype=torch.bool)
    own[batch.offsets[1] : batch.offsets[2]] = True
    expected = torch.where(own, soft.per_token, 0.5 * soft.per_token + 0.5 * soft.terms["cross_entropy"])
    torch.testing.assert_close(half.per_token, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": "decoupled_kl", "temperature": 2.0}, "use support 'hidden', or temperature 1"),
        ({"divergence": "decoupled_kl", "support": {"kind": "sampled"}}, "estimates forward_kl"),
        ({"divergence": "decoupled_kl", "alignment": {"kind": "bytes"}}, "leave alignment out"),
        ({"divergence": {"name": "adaptive_teaching", "alpha": 1.5}}, "give a number from 0 to 1"),
        ({"divergence": {"name": "adaptive_teaching", "beta": 1.0}}, "takes no 'beta'"),
        ({"divergence": "adaptive_teaching", "temperature": 2.0, "support": {"kind": "hidden"}}, "at temperature 1"),
        ({"divergence": "adaptive_teaching", "normalize": "sequences"}, "leave normalize out"),
        ({"divergence": {"name": "jensen_shannon", "beta": 2.0}}, "give a number from 0 to 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LogitKDConfig(**settings)


def test_hard_labels_without_such_rows_are_refused():
    with pytest.raises(ValueError, match="there are no hard labels"):
        OnPolicyConfig(hard_label_weight=0.5)


@pytest.mark.parametrize("kind", ["logit_kd", "on_policy"])
@pytest.mark.long
def test_two_workers_with_micro_batches_learn_the_same(kind, tmp_path, tiny_student, served):
    method = {"kind": kind, "divergence": "adaptive_teaching", "support": {"kind": "topk", "k": 16}}
    for name, workers, tokens in (("one", 0, 100_000), ("two", 2, 60)):
        folder = tmp_path / name
        folder.mkdir()
        distill(
            parse_config(settings(folder, tiny_student, method, workers=workers, steps=3, micro_batch_tokens=tokens))
        )
    assert_same_learning(tmp_path / "one" / "run", tmp_path / "two" / "run")
    first = metrics(tmp_path / "one" / "run")[0]
    assert 0.4 < first["hard"] < 0.6
    assert first["others_kl"] > 0
