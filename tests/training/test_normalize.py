"""`method.normalize: sequences` gives each sequence the same weight, with any micro-batches and workers."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayk.data.batches import BatchSampler
from rayk.data.tokenizing import tokenize
from rayk.run import distill
from tests.runs import assert_losses_close, assert_same_learning, config, curve, weights

SEQUENCES = {"kind": "supervised", "normalize": "sequences"}


def test_steps_equal_a_dense_reference_in_plain_pytorch(tmp_path, tiny_student):
    settings = config(tmp_path, tiny_student, SEQUENCES, micro_batch_tokens=200, schedule="constant")
    distill(settings)
    table = tokenize(settings.data.train, settings.data, AutoTokenizer.from_pretrained(tiny_student))
    model = AutoModelForCausalLM.from_pretrained(tiny_student, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step in range(6):
        means = []
        for index in BatchSampler(table.lengths, 8, settings.seed, 6).rows(step):
            row = table[int(index)]
            logits = model(input_ids=torch.tensor(row.input_ids[None], dtype=torch.long)).logits[0]
            predicts = logits[:-1][torch.tensor(row.counted[1:])]
            means.append(F.cross_entropy(predicts, torch.tensor(row.targets, dtype=torch.long)))
        loss = torch.stack(means).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert_losses_close(curve(tmp_path / "run"), losses)
    assert_losses_close(curve(tmp_path / "run", "cross_entropy"), losses)
    trained = weights(tmp_path / "run")
    for name, value in model.named_parameters():
        np.testing.assert_allclose(trained[name], value.detach(), atol=2e-4, err_msg=name)


@pytest.mark.slow
def test_micro_batches_do_not_change_learning(tmp_path, tiny_student):
    for folder, tokens in (("whole", 100_000), ("cut", 150), ("rows", 1)):
        (tmp_path / folder).mkdir()
        distill(config(tmp_path / folder, tiny_student, SEQUENCES, micro_batch_tokens=tokens))
        assert_same_learning(tmp_path / "whole" / "run", tmp_path / folder / "run")


@pytest.mark.long
@pytest.mark.parametrize(
    "method",
    [
        {"kind": "logit_kd", "support": {"kind": "topk", "k": 8}, "normalize": "sequences"},
        {"kind": "on_policy", "form": "policy", "normalize": "sequences"},
    ],
    ids=lambda method: method["kind"],
)
def test_workers_do_not_change_learning(method, tmp_path, tiny_student, served):
    for folder, training in (("alone", {}), ("group", {"workers": 2, "micro_batch_tokens": 120})):
        (tmp_path / folder).mkdir()
        distill(config(tmp_path / folder, tiny_student, method, **training))
    assert_same_learning(tmp_path / "alone" / "run", tmp_path / "group" / "run")
