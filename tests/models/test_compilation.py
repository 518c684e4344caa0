"""Compiled layers compute what the layers compute, for rows of any lengths, and are left out of generation."""

import copy

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from rayk.data.batches import collate
from rayk.errors import InputError
from rayk.losses import linear_divergence
from rayk.models.compilation import compile_layers
from rayk.models.packing import enable_packing
from rayk.signals.sequence import TokenSequence
from rayk.training.student import Student
from tests.tiny import tiny_model

LENGTHS = [(9, 14, 5), (20, 3), (31, 8, 8, 2), (6, 17)]


def batch(lengths, seed=0):
    random = np.random.default_rng(seed)
    rows = [
        TokenSequence(random.integers(4, 300, length).astype(np.int32), np.arange(length) >= length // 2)
        for length in lengths
    ]
    return collate(rows, 0)


def train(model, steps):
    """Train on a dense divergence from fixed targets; return the losses."""
    student, losses = Student(model).train(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for lengths in steps:
        rows = batch(lengths)
        hidden = student.hidden(rows)
        teacher = torch.linspace(-2, 2, hidden.shape[0] * 384).reshape(-1, 384)
        loss = linear_divergence(hidden, student.head, teacher, "forward_kl").mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def packing_model():
    model = tiny_model(layers=2)
    enable_packing(model)
    return model


@pytest.fixture
def compiler(monkeypatch):
    """`torch.compile`, which the other tests switch off."""
    monkeypatch.setattr(torch._dynamo.config, "disable", False)
    torch.compiler.reset()


@pytest.mark.slow
def test_compiled_layers_train_alike_on_packed_rows_of_changing_lengths(compiler):
    plain = packing_model()
    compiled = copy.deepcopy(plain)
    names = list(compiled.state_dict())
    counter = CompileCounterWithBackend("eager")
    compile_layers(compiled, backend=counter)
    expected, losses = train(plain, LENGTHS), train(compiled, LENGTHS)
    assert losses == pytest.approx(expected, rel=1e-5) and losses[-1] < losses[0]
    assert list(compiled.state_dict()) == names
    frames = counter.frame_count
    assert frames
    train(compiled, [(12, 4, 25), (7, 2, 2, 2)])
    assert counter.frame_count == frames  # other lengths use the code that exists
    prompt = batch([6]).input_ids
    answers = [model.eval().generate(prompt, max_new_tokens=5, do_sample=False) for model in (plain, compiled)]
    assert answers[1].shape == (1, 11) and counter.frame_count == frames


def test_a_body_without_a_list_of_layers_is_refused():
    model = tiny_model()
    model.model.layers = None
    with pytest.raises(InputError, match="LlamaForCausalLM has no list of layers.*set it to false"):
        compile_layers(model)
