"""`evaluation.keep_best` saves the model of the best evaluation, and `evaluation.patience` ends a run early, with any
interruptions and workers."""

import math
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayk.config import EvaluationConfig, parse_config
from rayk.errors import InputError, RaykError, RunFailed
from rayk.methods import METHODS, Supervised
from rayk.report.report import write_report
from rayk.run import distill
from rayk.training.best import BestEvaluation
from rayk.training.checkpoint import CheckpointStore
from tests.checkpoints import saved_weights
from tests.runs import assert_same_learning, curve, metrics, settings, weights

LATER_STEPS_ARE_WORSE = {"steps": 8, "learning_rate": 3.0, "schedule": "constant", "warmup_steps": 6}


def prepared(folder, student, lora=None, evaluation=None, **training):
    """A run whose loss falls in its first steps and rises in its last ones."""
    folder.mkdir(parents=True, exist_ok=True)
    values = settings(folder, student, **LATER_STEPS_ARE_WORSE | training)
    values["data"]["evaluation"] = values["data"]["train"]
    values["student"] |= {"lora": lora} if lora else {}
    values["evaluation"] = {"every_steps": 1, "keep_best": {"metric": "loss"}, **(evaluation or {})}
    return parse_config(values)


def best_step(run, mode="min") -> int:
    losses = curve(run.output_path, "evaluation_loss")
    best = 1 + int({"min": np.argmin, "max": np.argmax}[mode](losses))
    assert 1 <= best < len(losses)
    return best


def test_best_evaluation_is_the_first_of_the_lowest_or_highest_ones():
    for mode, expected in (("min", 3), ("max", 2)):
        best = BestEvaluation(EvaluationConfig(keep_best={"metric": "loss", "mode": mode}, patience=2))
        for step, value in enumerate([math.nan, 2.0, 1.0, 1.0, 1.5]):
            best.update(step + 1, {"loss": value})
            assert best.patience_is_over == (step + 1 == expected + 2 or step == 4)
        restored = BestEvaluation(EvaluationConfig(keep_best={"metric": "loss", "mode": mode}, patience=2))
        restored.load_state_dict(best.state_dict(), steps=[2, 3])
        assert (restored.step, restored.patience_is_over) == (best.step, best.patience_is_over) == (expected, True)


def test_best_of_another_metric_or_without_its_checkpoint_is_forgotten():
    best = BestEvaluation(EvaluationConfig(keep_best={"metric": "loss"}))
    best.update(1, {"loss": 1.0})
    other = BestEvaluation(EvaluationConfig(keep_best={"metric": "loss", "mode": "max"}))
    other.load_state_dict(best.state_dict(), steps=[1])
    assert other.step is None
    again = BestEvaluation(EvaluationConfig(keep_best={"metric": "loss"}))
    again.load_state_dict(best.state_dict(), steps=[2])
    assert again.step is None


@pytest.mark.slow
@pytest.mark.parametrize(("lora", "mode"), [(None, "min"), ({"r": 4, "alpha": 400}, "max")], ids=["whole", "lora"])
def test_saved_model_is_that_of_the_best_evaluation(lora, mode, tmp_path, tiny_student):
    # The adapter's loss is highest in its first steps, and hardly changes in its last ones.
    evaluation = {"keep_best": {"metric": "loss", "mode": mode}}
    run = prepared(tmp_path / "best", tiny_student, lora, evaluation, keep_checkpoints=1)
    result = distill(run)
    best = best_step(run, mode)
    value = {"min": min, "max": max}[mode](curve(run.output_path, "evaluation_loss"))
    assert result.summary["best"] == {"step": best, "metric": "loss", "value": value, "stopped_early": False}
    assert CheckpointStore(run.checkpoints).steps() == [best, 8]
    assert result.summary["student"]["loss"] == pytest.approx(result.summary["best"]["value"], rel=1e-5)
    shorter = prepared(tmp_path / "shorter", tiny_student, lora, evaluation, steps=best)
    distill(shorter)
    for name, value in weights(shorter.output_path).items():
        np.testing.assert_allclose(weights(run.output_path)[name], value, atol=1e-5, err_msg=name)
    write_report([run.output_path], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert f"model of step {best}, the best by loss" in page and "A ring marks the best evaluation" in page


@pytest.mark.slow
def test_run_ends_when_patience_is_over_and_stays_finished(tmp_path, tiny_student):
    run = prepared(tmp_path, tiny_student, evaluation={"patience": 2}, steps=50)
    summary = distill(run).summary
    best = best_step(run)
    assert curve(run.output_path, "step")[-1] == best + 2
    assert (summary["best"]["step"], summary["best"]["stopped_early"]) == (best, True)
    before = weights(run.output_path)
    again = distill(run, resume=True).summary
    assert curve(run.output_path, "step")[-1] == best + 2
    assert (again["best"], again["student"]) == (summary["best"], pytest.approx(summary["student"]))
    assert all((before[name] == value).all() for name, value in weights(run.output_path).items())


@pytest.mark.slow
def test_resumed_run_remembers_the_best_evaluation(tmp_path, tiny_student):
    evaluation = {"patience": 3}
    whole = prepared(tmp_path / "whole", tiny_student, evaluation=evaluation, steps=50)
    parts = prepared(tmp_path / "parts", tiny_student, evaluation=evaluation, steps=50, checkpoint_every_steps=1)
    for run in (whole, parts):
        distill(run)
    best = best_step(whole)
    shutil.rmtree(f"{parts.checkpoints}/step-{best + 3:08d}")
    shutil.rmtree(parts.output_path / "model")
    assert CheckpointStore(parts.checkpoints).steps() == [best, best + 2]
    assert distill(parts, resume=True).summary["best"] == distill(whole, resume=True).summary["best"]
    assert_same_learning(whole.output_path, parts.output_path, 1e-6)


@pytest.mark.slow
def test_missing_checkpoint_of_the_best_evaluation_is_an_error(tmp_path, tiny_student, monkeypatch):
    run = prepared(tmp_path, tiny_student)
    monkeypatch.setattr(CheckpointStore, "manifest", lambda self, step: None)
    with pytest.raises(RunFailed, match=r"the best evaluation, is missing .* resume with evaluation.keep_best null"):
        distill(run)
    values = run.model_dump(mode="json")
    values["evaluation"]["keep_best"] = None
    assert distill(parse_config(values), resume=True).summary["best"] is None


def test_answers_that_decide_are_generated_at_every_evaluation(tmp_path, tiny_student):
    evaluation = {
        "every_steps": 4, "keep_best": {"metric": "rouge_l"}, "metrics": ["rouge_l"],
        "generation": {"max_new_tokens": 4, "rows": 4},
    }  # fmt: skip
    run = prepared(tmp_path, tiny_student, evaluation=evaluation)
    summary = distill(run).summary
    values = [row["evaluation_rouge_l"] for row in metrics(run.output_path) if "evaluation_loss" in row]
    assert len(values) == 2 and summary["student"]["rouge_l"] == pytest.approx(max(values))


def test_weights_of_a_methods_modules_are_those_of_the_best_evaluation(tmp_path, tiny_student, monkeypatch):
    seen = []

    class Scaled(Supervised):
        """Its module's weight is part of what is saved with the best evaluation."""

        def __init__(self, *arguments, **parts):
            super().__init__(*arguments, **parts)
            self.scale = torch.nn.Linear(1, 1)
            seen.append(self)

        def modules(self):
            return self.scale

        def loss(self, student, experience):
            loss = super().loss(student, experience)
            return type(loss)(loss.per_token * self.scale.weight.exp().squeeze(), loss.terms)

    monkeypatch.setitem(METHODS, "supervised", Scaled)
    run = prepared(tmp_path, tiny_student, keep_checkpoints=9)
    distill(run)
    saved = saved_weights(run.checkpoints, best_step(run))
    assert torch.equal(seen[-1].scale.weight.detach(), saved["method_modules.weight"])


@pytest.mark.parametrize(
    ("evaluation", "said"),
    [
        ({"keep_best": {"metric": "accuracy"}}, "'accuracy' is not measured in this run; choose one of loss"),
        ({"keep_best": {"metric": "forward_kl"}}, "'forward_kl' is not measured in this run; choose one of loss"),
        ({"keep_best": {}, "every_steps": None}, "set data.evaluation and evaluation.every_steps"),
        ({"keep_best": None, "patience": 2}, "set 'keep_best' to the metric that decides"),
        ({"keep_best": {"metric": "stopped"}, "generation": {}}, "keep_best.mode is missing for 'stopped'"),
    ],
)
def test_metric_must_be_measured(evaluation, said, tmp_path, tiny_student):
    with pytest.raises(RaykError, match=said):
        prepared(tmp_path, tiny_student, evaluation=evaluation)


def test_metric_of_answers_needs_rows_with_prompts(tmp_path, tiny_student):
    (tmp_path / "texts.jsonl").write_text('{"text": "the cat sat"}\n')
    values = prepared(tmp_path, tiny_student).model_dump(mode="json")
    values["data"]["evaluation"] = {"path": str(tmp_path / "texts.jsonl"), "format": "text"}
    values["evaluation"] |= {"keep_best": {"metric": "accuracy"}, "generation": {"max_new_tokens": 2}}
    with pytest.raises(InputError, match="'accuracy' needs answers, but no row of data.evaluation has a prompt"):
        distill(parse_config(values))


def test_divergences_from_a_teacher_with_other_tokens_are_not_measured(tmp_path, tiny_student):
    values = settings(tmp_path, tiny_student, {"kind": "logit_kd", "alignment": {"kind": "bytes"}})
    values["data"]["evaluation"] = values["data"]["train"]
    values["evaluation"] = {"every_steps": 1, "keep_best": {"metric": "forward_kl"}}
    with pytest.raises(InputError, match="'forward_kl' is not measured in this run; choose one of loss"):
        parse_config(values)


@pytest.mark.long
def test_run_that_generates_ahead_ends_early(tmp_path, tiny_student, served):
    method = {"kind": "on_policy", "support": {"kind": "topk", "k": 8}}
    values = settings(tmp_path, tiny_student, method, steps=30, workers=1)
    values["data"]["evaluation"] = values["data"]["train"]
    values["rollouts"] |= {"max_staleness": 2}
    # The loss falls, so the first evaluation remains the best one of mode max.
    values["evaluation"] = {"every_steps": 2, "keep_best": {"metric": "forward_kl", "mode": "max"}, "patience": 2}
    summary = distill(parse_config(values)).summary
    assert (summary["best"]["step"], summary["steps"]) == (2, 6)
    assert summary["student"]["forward_kl"] == pytest.approx(summary["best"]["value"], rel=1e-3)


@pytest.mark.long
def test_workers_stop_together_with_the_model_of_one(tmp_path, tiny_student, ray_cluster):
    evaluation = {"patience": 2}
    alone = prepared(tmp_path / "alone", tiny_student, evaluation=evaluation, steps=20)
    group = prepared(tmp_path / "group", tiny_student, evaluation=evaluation, steps=20, workers=2)
    one, two = (distill(run).summary for run in (alone, group))
    assert one["best"]["step"] == two["best"]["step"] == best_step(alone)
    assert one["student"] == pytest.approx(two["student"], rel=1e-3)
    assert_same_learning(alone.output_path, group.output_path)
    tokenizer = AutoTokenizer.from_pretrained(group.output_path / "model")
    assert AutoModelForCausalLM.from_pretrained(group.output_path / "model").config.vocab_size >= len(tokenizer)
