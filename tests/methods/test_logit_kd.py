"""The loss of logit_kd is α·CE + (1−α)·T²·D, with D at temperature T and CE at temperature 1."""

from types import SimpleNamespace

import pytest
import torch

from rayk.config import LogitKDConfig
from rayk.config.support import TopK
from rayk.methods import Experience, LogitKD, Supervised
from rayk.signals.batch import SignalBatch
from tests.methods.small_batch import VOCABULARY, dense_logits
from tests.tiny import tiny_model


def signals_of(logits, batch, temperature, k=VOCABULARY):
    log_p = logits.detach().log_softmax(1)
    values, ids = log_p.topk(k, dim=1)
    rest = log_p.scatter(1, ids, float("-inf"))
    tails = [(rest / t).logsumexp(1) for t in (1.0, temperature)]
    target = log_p.gather(1, batch.targets[:, None])[:, 0]
    support = TopK(k, (1.0, temperature))
    return SignalBatch(support, batch.offsets, target, VOCABULARY, ids, values, torch.stack(tails, 1))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_loss_mixes_hard_labels_with_the_divergence_at_temperature(batch, student, alpha, squared, divergence):
    temperature = 2.0
    teacher = dense_logits(tiny_model(seed=4, peaked=3.0), batch)
    settings = LogitKDConfig(
        hard_label_weight=alpha, temperature=temperature, temperature_squared=squared, divergence=divergence
    )
    signals = signals_of(teacher, batch, temperature)
    loss = LogitKD(settings, None).loss(student, Experience(batch, signals))
    ours = dense_logits(student.model, batch)
    log_p, log_q = (teacher / temperature).log_softmax(1), (ours / temperature).log_softmax(1)
    if divergence == "reverse_kl":
        log_p, log_q = log_q, log_p
    soft = (log_p.exp() * (log_p - log_q)).sum(1)
    hard = -ours.log_softmax(1).gather(1, batch.targets[:, None])[:, 0]
    expected = alpha * hard + (1 - alpha) * soft * (temperature**2 if squared else 1)
    torch.testing.assert_close(loss.per_token, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss.terms["cross_entropy"], hard, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss.terms[divergence], soft, rtol=1e-4, atol=1e-5)


def test_batchmean_is_that_of_pytorch_over_any_micro_batches(batch, student):
    """BabyLlama's loss: KLDivLoss of [rows, length, vocabulary] is divided by rows, the cross-entropy by tokens."""
    teacher = dense_logits(tiny_model(seed=4, peaked=3.0), batch)
    settings = LogitKDConfig(
        hard_label_weight=0.5, temperature=2.0, temperature_squared=True, soft_reduction="batchmean"
    )
    method, experience = LogitKD(settings, None), Experience(batch, signals_of(teacher, batch, 2.0))
    workers = SimpleNamespace(sums=lambda values: values)
    experience = method.synchronize(experience, workers, 0)
    ours = dense_logits(student.model, batch)
    soft = torch.nn.functional.kl_div(
        (ours / 2).log_softmax(1), (teacher / 2).softmax(1).detach(), reduction="sum"
    ) / batch.rows  # fmt: skip
    hard = torch.nn.functional.cross_entropy(ours, batch.targets)
    parts = [method.loss(student, experience.select([row])).per_token for row in range(batch.rows)]
    torch.testing.assert_close(torch.cat(parts).mean(), 0.5 * hard + 0.5 * 4 * soft, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="soft_reduction 'batchmean'"):
        LogitKDConfig(soft_reduction="batchmean", normalize="sequences")


def test_temperature_is_added_to_the_support():
    assert LogitKDConfig(temperature=4.0).support.temperatures == (1.0, 4.0)
    assert LogitKDConfig().support.temperatures == (1.0,)


@pytest.mark.parametrize("k", [4, VOCABULARY])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_loss_with_an_equal_teacher_is_zero(batch, student, k, temperature):
    signals = signals_of(dense_logits(student.model, batch), batch, temperature, k)
    method = LogitKD(LogitKDConfig(temperature=temperature, temperature_squared=True), None)
    loss = method.loss(student, Experience(batch, signals)).per_token
    assert loss.abs().max() < 1e-5
    loss.sum().backward()
    assert max(p.grad.abs().max() for p in student.parameters()) < 1e-4
    student.zero_grad()


def test_supervised_loss_is_the_cross_entropy_of_counted_tokens(batch, student):
    loss = Supervised(None, None).loss(student, Experience(batch)).per_token
    expected = torch.nn.functional.cross_entropy(dense_logits(student.model, batch), batch.targets, reduction="none")
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_selected_rows_keep_their_signals(batch, student):
    signals = signals_of(dense_logits(tiny_model(seed=4), batch), batch, 2.0)
    whole = Experience(batch, signals)
    method = LogitKD(LogitKDConfig(temperature=2.0), None)
    together = method.loss(student, whole).per_token.split(batch.offsets.diff().tolist())
    for rows in ([2, 0], [1]):
        part = whole.select(rows)
        assert part.count == sum(len(together[row]) for row in rows)
        expected = torch.cat([together[row] for row in rows])
        torch.testing.assert_close(method.loss(student, part).per_token, expected, rtol=1e-4, atol=1e-5)
