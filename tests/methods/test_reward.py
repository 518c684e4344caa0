"""A task reward beside distillation: functions, comparison within a prompt, and whole runs."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rayk.config import OnPolicyConfig, RewardConfig, parse_config
from rayk.data.batches import collate
from rayk.errors import InputError
from rayk.methods import METHODS, Experience, OnPolicy, resolve_method
from rayk.methods.reward import COLUMN, TaskReward, number_answer
from rayk.rollouts import Rollout
from rayk.run import distill
from tests.runs import curve, metrics, settings


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("3 + 4 = 7, so the answer is 7.", "7", 1.0),
        ("First 7, then 8.", "7", 0.0),
        ("#### 1,250", "She earned 50 * 25 = 1250. #### 1250.00", 1.0),
        ("I do not know.", "7", 0.0),
        ("", 7, 0.0),
        ("7", 7, 1.0),
    ],
)
def test_number_answers_are_compared_as_numbers(completion, answer, reward):
    assert number_answer(completion, {"answer": answer}) == reward


@pytest.mark.parametrize("row", [{}, {"answer": None}, {"answer": "blue"}])
def test_rows_without_a_number_are_refused(row):
    with pytest.raises(InputError, match="needs a number in the field 'answer' of each row"):
        number_answer("7", row)


FUNCTIONS = """
def fails(completion, row): return row["nothing"]
def nan(completion, row): return float("nan")
def text(completion, row): return "1"
def length(completion, row): return len(completion)
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("fails", r"'own_rewards:fails' fails for row 3: KeyError: 'nothing'"),
        ("nan", "returns nan for row 3; return a finite number"),
        ("text", "returns '1' for row 3; return a finite number"),
        ("missing", "has no function 'missing'"),
    ],
)
def test_a_wrong_function_is_one_sentence(functions, name, sentence):
    with pytest.raises(InputError, match=sentence):
        TaskReward(RewardConfig(function=f"own_rewards:{name}")).score(rollout([1, 2], [3], 0.0, where="row 3"))


def test_a_reward_that_cannot_be_loaded_is_refused_before_the_run(functions):
    reward = {"function": "own_rewards:missing"}
    with pytest.raises(InputError, match="method.reward.function: module 'own_rewards' has no function 'missing'"):
        resolve_method(OnPolicyConfig(form="policy", reward=reward))


def rollout(prompt, completion, reward, where="a"):
    ids = np.array([*prompt, *completion], np.int32)
    counted = np.arange(len(ids)) >= len(prompt)
    return Rollout(
        ids, counted, None, len(prompt), where, logprobs=np.zeros(len(completion), np.float32), reward=reward
    )


class OneOf:
    """One worker of a group; `others` are the values that the others give to `gather`."""

    def __init__(self, *others):
        self.others = others

    def gather(self, value):
        self.given = value
        return [value, *self.others]


def test_rewards_are_compared_with_the_same_prompts_completions_on_all_workers():
    mine = [rollout([1, 2], [3, 4, 5], 1.0), rollout([1, 2], [3], 0.0), rollout([1, 7], [3, 3], 5.0)]
    theirs = [rollout([1, 2], [9, 9], 5.0)]
    method = TaskReward(RewardConfig(weight=0.5))

    other = OneOf()
    method.add_advantages(Experience(collate(theirs, 0)), other)
    advantages = method.add_advantages(Experience(collate(mine, 0)), OneOf(other.given)).columns[COLUMN]
    assert advantages.tolist() == [-0.5, -0.5, -0.5, -1.0, 0.0, 0.0]  # the mean of 1, 0 and 5 is 2


def test_a_step_adds_the_reward_to_the_distillation(
    functions, monkeypatch, tmp_path, tiny_student, tiny_teacher, served
):
    rows: list[Rollout] = []

    class Watching(OnPolicy):
        def loss(self, student, experience):
            rows.extend(experience.batch.sequences)
            return super().loss(student, experience)

    monkeypatch.setitem(METHODS, "on_policy", Watching)
    reward = {"function": "own_rewards:length", "weight": 0.25}
    values = settings(tmp_path, tiny_student, {"kind": "on_policy", "form": "policy", "reward": reward}, steps=1)
    values["rollouts"] |= {"samples": 4}
    distill(parse_config(values))
    teacher = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    rewards = np.array([len(row.text) for row in rows])
    assert [row.reward for row in rows] == rewards.tolist() and len(set(rewards)) > 1
    total = tokens = 0.0
    for row, value in zip(rows, rewards, strict=True):
        same = [other.reward for other in rows if other.prompt_ids.tolist() == row.prompt_ids.tolist()]
        assert len(same) == 4
        ids = torch.from_numpy(row.input_ids).long()
        with torch.no_grad():
            log_p = teacher(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        log_p = log_p.gather(1, ids[1:, None])[row.counted[1:], 0].numpy()
        advantage = log_p - row.logprobs + 0.25 * (value - np.mean(same))
        total, tokens = total - advantage.sum(), tokens + len(advantage)
    assert curve(values["output"])[0] == pytest.approx(total / tokens, rel=1e-3, abs=1e-4)
    assert metrics(values["output"])[0]["rollout_reward"] == pytest.approx(rewards.mean())
