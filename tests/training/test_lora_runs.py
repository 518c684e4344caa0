"""Runs that train a LoRA adapter: with every method, resumed, merged and saved."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rayk.config import parse_config
from rayk.errors import InputError
from rayk.report.report import write_report
from rayk.run import distill, evaluate_model
from tests.checkpoints import saved_method_state, saved_weights
from tests.runs import assert_losses_close, assert_same_learning, curve, metrics, settings, weights, write_tasks
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.test_preference_runs import write_pairs

LORA = {"r": 4, "alpha": 8}
KD = {"kind": "logit_kd", "support": {"kind": "topk", "k": 8}}
MIXED = {"kind": "minillm", "support": {"kind": "requested", "k": 8}, "requested_ids": 8}
METHODS_OF = [
    {"kind": "supervised"}, KD, {"kind": "on_policy", "support": {"kind": "requested", "k": 8}, "requested_ids": 4},
    MIXED, {"kind": "preference", "beta": 0.5}, {"kind": "in_context", "demonstrations": {"k": 2}},
]  # fmt: skip


def prepared(folder, student, method=KD, lora=LORA, rollouts=None, evaluation=False, **training):
    """Settings of a run in `folder`/run, with or without an adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    values = settings(folder, student, method, **training)
    values["student"] |= {"lora": lora} if lora else {}
    kind = values["method"]["kind"]
    if kind == "preference":
        values["data"]["train"]["path"] = str(write_pairs(folder / "pairs.jsonl"))
        values["teachers"] = []
    if kind == "in_context":
        values["data"]["train"]["path"] = str(write_tasks(folder / "tasks"))
    if rollouts:
        values["rollouts"] |= rollouts
    if evaluation:
        values["data"]["evaluation"] = {"path": values["data"]["train"]["path"]}
    return parse_config(values)


@pytest.mark.parametrize("method", METHODS_OF, ids=lambda method: method["kind"])
def test_every_method_starts_from_the_base_and_trains_the_adapter_only(method, tmp_path, tiny_student, served):
    training = {"steps": 4, "batch_size": 16, "learning_rate": 2e-2, "schedule": "constant"}
    whole = prepared(tmp_path / "whole", tiny_student, method, lora=None, **training | {"steps": 1})
    adapter = prepared(tmp_path / "adapter", tiny_student, method, **training)
    for run in (whole, adapter):
        distill(run)
    first, *later = metrics(adapter.output_path)
    expected = metrics(whole.output_path)[0]
    same = set(expected) - {name for name in expected if "second" in name or name.endswith("_at")} - {"gradient_norm"}
    for name in same:
        assert first[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    assert 0 < first["gradient_norm"] < np.inf and all(np.isfinite(row["loss"]) for row in later)
    base, now = load_file(f"{tiny_student}/model.safetensors"), weights(adapter.output_path)
    changed = {name for name in base if not np.allclose(base[name], now[name], atol=1e-4)}
    assert changed == {name for name in base if "proj" in name}


@pytest.mark.slow
def test_reference_of_preferences_is_the_student_without_its_adapter(tmp_path, tiny_student):
    method = {"kind": "preference", "beta": 0.5}
    whole = prepared(tmp_path / "whole", tiny_student, method, lora=None, steps=6, learning_rate=1e-9)
    adapter = prepared(tmp_path / "adapter", tiny_student, method, LORA | {"dropout": 0.5}, learning_rate=5e-2)
    states = []
    for run in (whole, adapter):
        distill(run)
        states.append(saved_method_state(run.checkpoints))
    assert torch.equal(states[0]["keys"], states[1]["keys"])
    torch.testing.assert_close(states[1]["logprobs"], states[0]["logprobs"], rtol=1e-5, atol=1e-4)
    assert curve(adapter.output_path, "reward_margin")[-1] > 0.01


def test_student_approaches_its_teacher(tmp_path, tiny_student, served):
    run = prepared(tmp_path, tiny_student, steps=40, batch_size=16, learning_rate=2e-2, evaluation=True)
    summary = distill(run).summary
    losses = curve(run.output_path)
    assert np.mean(losses[-5:]) < 0.8 * losses[0]
    # The merged model in another folder has the metrics of the adapter on its base.
    measured = evaluate_model(run)["student"]
    assert measured.keys() == summary["student"].keys()
    assert {name: measured[name] for name in measured} == pytest.approx(summary["student"], rel=1e-4, abs=1e-5)
    size = summary["parameters"]
    assert (
        0
        < size["trained"]
        < size["total"]
        == size["trained"] + sum(tensor.numel() for tensor in load_file(f"{tiny_student}/model.safetensors").values())
    )
    assert json.loads((run.output_path / "summary.json").read_text())["parameters"] == size
    write_report([run.output_path], tmp_path / "report.html")
    assert f"{size['trained']:,} of {size['total']:,} parameters trained" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("method", [{"kind": "supervised"}, KD], ids=["supervised", "logit_kd"])
def test_resumed_run_equals_the_undisturbed_one_from_the_adapter_alone(method, tmp_path, tiny_student, served):
    lora = LORA | {"dropout": 0.2}
    whole = prepared(tmp_path / "whole", tiny_student, method, lora)
    distill(whole)
    cut = prepared(tmp_path / "cut", tiny_student, method, lora, checkpoint_every_steps=2, keep_checkpoints=5)
    distill(cut)
    adapter = saved_weights(cut.checkpoints, 4)
    assert adapter and all(".lora_" in name for name in adapter)
    for folder in ("checkpoints/step-00000006", "model", "adapter"):
        shutil.rmtree(cut.output_path / folder)
    distill(cut, resume=True)
    assert_same_learning(whole.output_path, cut.output_path, 1e-6)
    one, other = (load_file(run.output_path / "adapter" / "adapter_model.safetensors") for run in (whole, cut))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_changed_base_weights_are_refused(tmp_path):
    def base(seed):
        tiny_model(tmp_path / "base", seed=seed, hidden=16, layers=1, tokenizer=tiny_tokenizer())

    base(1)
    run = prepared(tmp_path, str(tmp_path / "base"), "supervised", steps=2)
    distill(run)
    base(2)
    with pytest.raises(InputError, match=r"weights of student.model .*base' are not those that the run .*--output"):
        distill(run, resume=True)
    base(1)
    distill(run, resume=True)


@pytest.mark.long
def test_seed_and_settings_alone_decide_what_is_learned(tmp_path, tiny_student, ray_cluster):
    runs = {}
    for name, seed, workers in (("first", 3, 0), ("again", 3, 2), ("other", 4, 0)):
        values = prepared(tmp_path / name, tiny_student, "supervised", micro_batch_tokens=150, workers=workers)
        runs[name] = values.model_copy(update={"seed": seed})
        distill(runs[name])
    # With two workers over gloo, frozen weights have no gradients on either.
    assert_same_learning(runs["first"].output_path, runs["again"].output_path)
    assert curve(runs["first"].output_path) != curve(runs["other"].output_path)


@pytest.mark.slow
def test_adapter_trains_on_a_bfloat16_base_with_gradient_checkpointing(tmp_path, tiny_student):
    curves = {}
    for name, changes in {
        "float32": {}, "bfloat16": {"dtype": "bfloat16"}, "saving": {"gradient_checkpointing": True},
    }.items():  # fmt: skip
        values = prepared(tmp_path / name, tiny_student, "supervised", learning_rate=2e-2).model_dump(mode="json")
        values["student"] |= changes
        distill(parse_config(values))
        curves[name] = curve(tmp_path / name / "run")
    assert_losses_close(curves["saving"], curves["float32"], 1e-5)
    np.testing.assert_allclose(curves["bfloat16"], curves["float32"], rtol=2e-2)
    assert {each.dtype for each in weights_of(tmp_path / "bfloat16").values()} == {torch.float32}, "as its checkpoint"


def weights_of(folder):
    return load_file(folder / "run" / "model" / "model.safetensors")
