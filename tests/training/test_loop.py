"""Training depends on the learning settings only, not on workers or micro-batches, and equals plain PyTorch."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayk.config import TrainingConfig, parse_config
from rayk.config.support import TopK
from rayk.data.batches import BatchSampler
from rayk.data.tokenizing import tokenize
from rayk.errors import RunFailed
from rayk.methods import METHODS, Supervised
from rayk.run import distill
from rayk.signals.sequence import TokenSequence
from rayk.training.optimizer import learning_rate_at
from tests.runs import assert_losses_close, assert_same_learning, config, curve, metrics, settings, weights
from tests.tiny import tiny_model, tiny_tokenizer

KD = {
    "kind": "logit_kd", "support": {"kind": "topk", "k": 8}, "temperature": 2.0, "temperature_squared": True,
    "hard_label_weight": 0.3,
}  # fmt: skip
METHOD_SETTINGS = pytest.mark.parametrize("method", [{"kind": "supervised"}, KD], ids=lambda method: method["kind"])


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def student(request, tmp_path):
    tiny_model(tmp_path / "student", hidden=16, layers=1, tie=request.param, tokenizer=tiny_tokenizer())
    return str(tmp_path / "student")


@pytest.mark.long
def test_workers_and_micro_batches_do_not_change_learning(tmp_path, tiny_student, served):
    alone, group = tmp_path / "alone", tmp_path / "group"
    for folder in (alone, group):
        folder.mkdir()
    distill(config(alone, tiny_student, KD, micro_batch_tokens=100_000))
    # The lengths of rows differ so much that two workers have different numbers of micro-batches.
    distill(config(group, tiny_student, KD, micro_batch_tokens=120, workers=2))
    assert_same_learning(alone / "run", group / "run")


@METHOD_SETTINGS
def test_micro_batches_do_not_change_learning(method, tmp_path, tiny_student, served):
    for folder, tokens in (("whole", 100_000), ("cut", 150), ("rows", 1)):
        (tmp_path / folder).mkdir()
        distill(config(tmp_path / folder, tiny_student, method, micro_batch_tokens=tokens))
        assert_same_learning(tmp_path / "whole" / "run", tmp_path / folder / "run")


@METHOD_SETTINGS
def test_steps_equal_a_dense_reference_in_plain_pytorch(method, tmp_path, student, served):
    training = {"weight_decay": 0.1, "warmup_steps": 2, "schedule": "linear", "max_grad_norm": 0.5}
    settings = config(tmp_path, student, method, micro_batch_tokens=200, **training)
    distill(settings)
    tokenizer = AutoTokenizer.from_pretrained(student)
    table = tokenize(settings.data.train, settings.data, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
                                  betas=(0.9, 0.95))  # fmt: skip
    losses = []
    for step in range(6):
        rows = [table[int(i)] for i in BatchSampler(table.lengths, 8, settings.seed, 6).rows(step)]
        count = sum(row.counted_tokens for row in rows)
        loss = sum(_dense_loss(model, row, method, served) for row in rows) / count
        rate = 5e-3 * ((step + 1) / 2 if step < 2 else 1 - (step - 2) / 4)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    assert_losses_close(curve(tmp_path / "run"), losses)
    trained = weights(tmp_path / "run")
    for name, value in model.named_parameters():
        np.testing.assert_allclose(trained[name], value.detach(), atol=2e-4, err_msg=name)


def _dense_loss(model, row: TokenSequence, method, teacher) -> torch.Tensor:
    """The sum of the loss over one row's counted tokens, from dense logits without padding."""
    logits = model(input_ids=torch.tensor(row.input_ids[None], dtype=torch.long)).logits[0]
    predicts = torch.tensor(row.counted[1:])
    logits, targets = logits[:-1][predicts], torch.tensor(row.targets, dtype=torch.long)
    hard = F.cross_entropy(logits, targets, reduction="sum")
    if method["kind"] == "supervised":
        return hard
    alpha, temperature = method["hard_label_weight"], method["temperature"]
    signals = teacher.score([row], TopK(8, (1.0, temperature)))
    log_p, log_tail = signals.at_temperature(temperature)
    q = (logits.double() / temperature).softmax(1)
    top = q.gather(1, signals.ids)
    log_q = torch.cat([top, 1 - top.sum(1, keepdim=True)], dim=1).log()
    log_p = torch.cat([log_p, log_tail[:, None]], dim=1).double()
    soft = (log_p.exp() * (log_p - log_q)).sum() * temperature**2
    return alpha * hard + (1 - alpha) * soft.float()


def test_student_equal_to_its_teacher_has_zero_loss(tmp_path, tiny_teacher, served):
    method = {"kind": "logit_kd", "support": {"kind": "topk", "k": 16}}
    distill(config(tmp_path, tiny_teacher, method, learning_rate=1e-5))
    assert max(map(abs, curve(tmp_path / "run"))) < 1e-4


def test_hidden_signals_equal_the_whole_vocabulary(tmp_path, served):
    student = str(tmp_path / "student")  # without padding, which would be one outcome for `topk` but many for `hidden`
    tiny_model(student, vocab_size=served.info.vocab_size, hidden=16, layers=1, tokenizer=tiny_tokenizer())
    curves = {}
    for name, support in {
        "hidden": {"kind": "hidden", "dtype": "float32"},
        "topk": {"kind": "topk", "k": served.info.vocab_size},
        "sampled": {"kind": "sampled", "draws": 40},
    }.items():
        (tmp_path / name).mkdir()
        method = {"kind": "logit_kd", "support": support, "divergence": "forward_kl"}
        distill(config(tmp_path / name, student, method, micro_batch_tokens=200))
        curves[name] = curve(tmp_path / name / "run")
    np.testing.assert_allclose(curves["hidden"], curves["topk"], atol=1e-3)
    np.testing.assert_allclose(curves["sampled"], curves["topk"], rtol=0.1)


def test_rows_with_unusable_signals_stop_the_run_or_are_left_out(tmp_path, tiny_student, served, broken):
    values = settings(tmp_path, tiny_student, KD, batch_size=16, steps=3) | {"teachers": broken}
    data, tokenizer = parse_config(values).data, AutoTokenizer.from_pretrained(tiny_student)
    table = tokenize(data.train, data, tokenizer)
    [eight] = tokenizer("8").input_ids
    well = [row for row in table if eight not in row.input_ids]
    assert 6 < len(well) < len(table) - 6
    sentence = r"'broken' returned an unusable signal for .*rows.jsonl, line \d+: .*NaN.* training.unusable_rows"
    with pytest.raises(RunFailed, match=sentence):
        distill(parse_config(values))
    values["output"] = str(tmp_path / "skipping")
    values["training"]["unusable_rows"] = "skip"
    distill(parse_config(values))
    steps = metrics(tmp_path / "skipping")
    assert sum(step["skipped_rows"] for step in steps) == len(table) - len(well)
    assert sum(step["counted_tokens"] for step in steps) == sum(row.counted_tokens for row in well)
    assert all(math.isfinite(step["loss"]) for step in steps)


@pytest.mark.slow
def test_bfloat16_is_close_to_float32(tmp_path, tiny_student):
    for precision in ("float32", "bfloat16"):
        (tmp_path / precision).mkdir()
        distill(config(tmp_path / precision, tiny_student, precision=precision, learning_rate=1e-3))
    exact, rounded = (curve(tmp_path / precision / "run") for precision in ("float32", "bfloat16"))
    assert exact != rounded
    np.testing.assert_allclose(rounded, exact, rtol=2e-2)
    assert {value.dtype.name for value in weights(tmp_path / "bfloat16" / "run").values()} == {"float32"}


def test_learning_rate_warms_up_and_follows_its_schedule():
    def rates(**settings):
        training = TrainingConfig(learning_rate=2.0, **settings)
        return [learning_rate_at(step, 8, training) for step in range(8)]

    assert rates(schedule="constant") == [2.0] * 8
    assert rates(schedule="constant", warmup_steps=4) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0]
    assert rates(schedule="constant", warmup_share=0.25) == [1.0, *[2.0] * 7]
    assert rates(schedule="linear") == pytest.approx([2.0 - step / 4 for step in range(8)])
    cosine = rates(schedule="cosine", warmup_steps=2, final_learning_rate=0.1)
    assert cosine[:3] == [1.0, 2.0, 2.0]
    assert cosine[3:] == pytest.approx([0.2 + 0.9 * (1 + math.cos(math.pi * i / 6)) for i in range(1, 6)])


def test_gradient_clipping_bounds_the_step_and_reports_the_norm_before_it(tmp_path, tiny_student):
    for name, bound in (("free", None), ("clipped", 1e-3)):
        (tmp_path / name).mkdir()
        distill(config(tmp_path / name, tiny_student, max_grad_norm=bound, steps=1, betas=[0.0, 0.0]))
    free, clipped = (metrics(tmp_path / name / "run")[0] for name in ("free", "clipped"))
    assert free["gradient_norm"] == clipped["gradient_norm"] > 1e-3


def test_dropout_is_on_in_training_and_off_in_evaluation(tmp_path, tiny_student, monkeypatch):
    seen = []

    class Watching(Supervised):
        def loss(self, student, experience):
            seen.append(student.model.training)
            return super().loss(student, experience)

    monkeypatch.setitem(METHODS, "supervised", Watching)
    settings = config(tmp_path, tiny_student)
    settings = settings.model_copy(
        update={"data": settings.data.model_copy(update={"evaluation": settings.data.train})}
    )
    settings = settings.model_copy(update={"evaluation": settings.evaluation.model_copy(update={"every_steps": 2})})
    distill(settings)
    assert seen == [True] * len(seen)


def test_metrics_describe_each_step(tmp_path, tiny_student):
    settings = config(tmp_path, tiny_student, steps=12)
    distill(settings)
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["epoch"] for row in rows] == pytest.approx([step / 6 for step in range(1, 13)])
    table = tokenize(settings.data.train, settings.data, AutoTokenizer.from_pretrained(tiny_student))
    for epoch in (rows[:6], rows[6:]):
        assert sum(row["tokens"] for row in epoch) == table.lengths.sum()
        assert sum(row["counted_tokens"] for row in epoch) == table.counted_tokens.sum()
    for row in rows:
        assert row["loss"] == row["cross_entropy"]
        assert 0 <= row["teacher_wait_seconds"] <= row["step_seconds"]
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["step_seconds"])
