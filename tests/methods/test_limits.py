"""Exploding rewards and ratios are named, and stop the run or are left out, as `training.unusable_rows` says."""

import itertools
import math

import pytest
import torch

from rayk.config import parse_config
from rayk.data.batches import collate
from rayk.data.examples import Example
from rayk.errors import RunFailed, UnusableSignal
from rayk.methods.limits import check_rewards, exceeds_ratio_limit
from rayk.run import distill
from rayk.training.checkpoint import CheckpointStore
from tests.runs import config, curve, settings

POLICY = {"kind": "on_policy", "form": "policy"}


def batch_of(*lengths: int):
    ids = [torch.arange(length + 1).int().numpy() for length in lengths]
    return collate([Example(each, each > 0, None, 1, f"line {row}") for row, each in enumerate(ids)], 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -11.0, 11.0])
@pytest.mark.parametrize(("place", "row"), [(0, 0), (1, 0), (2, 1), (4, 1), (5, 2)])
def test_row_with_an_exploding_reward_is_named(value, place, row):
    rewards = torch.full((6,), -10.0)
    check_rewards(rewards, batch_of(2, 3, 1), limit=10.0)
    rewards[place] = value
    with pytest.raises(UnusableSignal, match=f"line {row} has a reward of {value:.4g} nats") as raised:
        check_rewards(rewards, batch_of(2, 3, 1), limit=10.0)
    assert raised.value.rows == [row]


def test_only_more_likely_tokens_explode():
    written = torch.tensor([-3.0, -3.0, -3.0])
    now = written + torch.tensor([2.01, 1.99, -50.0]) * math.log(10)
    assert exceeds_ratio_limit(now, written, limit=100.0).tolist() == [True, False, False]


def test_exploding_rewards_stop_the_run(tmp_path, tiny_student, served):
    with pytest.raises(RunFailed, match=r"line \d+ has a reward of .* beyond method\.reward_limit \(0\.01\)"):
        distill(config(tmp_path, tiny_student, POLICY | {"reward_limit": 0.01}))


@pytest.mark.parametrize("method", [POLICY, {"kind": "minillm", "inner_epochs": 3, "teacher_share": 0}])
def test_exploding_ratios_stop_the_run_or_are_left_out(method, tmp_path, tiny_student, served):
    values = settings(tmp_path, tiny_student, method | {"ratio_limit": 1.02}, learning_rate=0.05, steps=3)
    values["rollouts"]["max_staleness"] = 1
    with pytest.raises(RunFailed, match="tokens are more than method.ratio_limit times as likely as when they were sa"):
        distill(parse_config(values))
    values["output"] = str(tmp_path / "skipping")
    values["training"]["unusable_rows"] = "skip"
    result = distill(parse_config(values))
    shares = curve(result.output, "unusable_share")
    assert len(shares) == 3
    assert 0 < max(shares) < 1


@pytest.mark.parametrize(("call", "kept"), [(5, False), (4, True)], ids=["midway", "between steps"])
def test_no_checkpoint_contains_half_a_step(call, kept, monkeypatch, tmp_path, tiny_student, served):
    calls = itertools.count(1)

    def explodes(student_logprobs, rollout_logprobs, limit):
        return torch.full_like(rollout_logprobs, next(calls) == call, dtype=torch.bool)

    monkeypatch.setattr("rayk.methods.minillm.exceeds_ratio_limit", explodes)
    method = {"kind": "minillm", "inner_epochs": 3, "teacher_share": 0}
    with pytest.raises(RunFailed, match="In step 2, tokens are more than method.ratio_limit times as likely"):
        distill(config(tmp_path, tiny_student, method, steps=3, micro_batch_tokens=100_000))
    store = CheckpointStore(str(tmp_path / "run" / "checkpoints"))
    assert store.steps() == ([1] if kept else [])
