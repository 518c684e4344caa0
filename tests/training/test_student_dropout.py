import json
import math

import numpy as np
import pytest
import torch

from rayk.config import MiniLLMConfig, OnPolicyConfig, PreferenceConfig, SupervisedConfig, parse_config
from rayk.data.batches import collate
from rayk.losses import linear_cross_entropy
from rayk.methods import resolve_method
from rayk.rollouts.policy_model import PolicyModel
from rayk.run import distill
from rayk.signals.sequence import TokenSequence
from rayk.training.student import Student
from tests.runs import curve, settings
from tests.tiny import tiny_model, tiny_tokenizer


def batch():
    rows = [np.arange(5, 5 + length, dtype=np.int32) for length in (12, 9)]
    return collate([TokenSequence(ids, np.arange(len(ids)) > 0) for ids in rows], 0)


def losses(student):
    return linear_cross_entropy(student.hidden(batch()), student.head, batch().targets)


def student_with(architecture, *, uses_dropout, checkpointing=False):
    model = tiny_model(architecture=architecture, layers=2)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Student(model, uses_dropout=uses_dropout)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_without_dropout_training_computes_what_evaluation_does(architecture, checkpointing):
    student = student_with(architecture, uses_dropout=False, checkpointing=checkpointing)
    expected = losses(student.eval()).detach()
    student.train()
    with PolicyModel(student.model, tiny_tokenizer()).inference_context():
        pass  # generation between two steps
    assert torch.equal(losses(student), expected)
    dropping = student_with(architecture, uses_dropout=True, checkpointing=checkpointing).train()
    assert not torch.allclose(losses(dropping), expected)


def test_without_dropout_layers_are_still_checkpointed():
    calls = {}
    for checkpointing in (False, True):
        student = student_with("gpt2", uses_dropout=False, checkpointing=checkpointing).train()
        count = []
        student.model.transformer.h[0].attn.register_forward_hook(lambda *_, count=count: count.append(1))
        losses(student).sum().backward()
        calls[checkpointing] = len(count)
    assert calls == {False: 1, True: 2}


@pytest.mark.parametrize(
    ("method", "uses_dropout"),
    [
        (SupervisedConfig(), True), (OnPolicyConfig(), True), (MiniLLMConfig(), False), (PreferenceConfig(), False),
        (OnPolicyConfig(form="policy", support={"kind": "logprob"}), False),
    ],
)  # fmt: skip
def test_methods_with_a_fixed_reference_use_no_dropout(method, uses_dropout):
    assert resolve_method(method)(method, None).uses_dropout is uses_dropout


def test_the_first_preference_loss_of_a_student_with_dropout_is_log_two(tmp_path):
    tiny_model(tmp_path / "student", architecture="gpt2", tokenizer=tiny_tokenizer())
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(json.dumps({"prompt": f"{i}?", "chosen": f" {i}", "rejected": f" {i + 1}!"}) + "\n" for i in range(8))
    )
    values = settings(tmp_path, str(tmp_path / "student"), "preference", steps=1)
    values["data"] = {"train": {"path": str(pairs)}}
    values["teachers"] = []
    result = distill(parse_config(values))
    assert curve(result.output) == pytest.approx([math.log(2)], abs=1e-5)
