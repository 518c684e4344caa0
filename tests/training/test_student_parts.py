"""Batches that may not be split by the loss are computed in parts of at most `max_tokens`, with the same gradients."""

import numpy as np
import pytest
import torch

from rayk.data.batches import collate
from rayk.signals.sequence import TokenSequence
from rayk.training.student import Student
from tests.tiny import tiny_model

LENGTHS = (5, 30, 12, 7, 30, 3, 40)


def batch():
    """Rows of very different lengths; the last one is longer than all parts, and one counts no token."""
    random = np.random.default_rng(0)
    rows = []
    for number, length in enumerate(LENGTHS):
        counted = np.arange(length) >= (length if number == 3 else length // 2)
        rows.append(TokenSequence(random.integers(4, 300, length).astype(np.int32), counted))
    return collate(rows, 0)


def gradients(max_tokens, precision="float32"):
    """The final states at the counted tokens, the gradients of all weights, and the tokens of each forward pass."""
    model = tiny_model()
    tokens = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, arguments, output: tokens.append(arguments[0].numel()))
    states = Student(model, precision, max_tokens).hidden(batch())
    (states.float() * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
    return states.detach(), [p.grad for p in model.parameters() if p.grad is not None], tokens


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_parts_have_the_states_and_gradients_of_the_whole(precision):
    whole, expected, at_once = gradients(None, precision=precision)
    states, found, tokens = gradients(32, precision=precision)
    assert len(at_once) == 1 and max(at_once) > 100 and max(tokens) <= max(LENGTHS)
    assert sum(tokens) < 2 * len(LENGTHS) * max(LENGTHS)
    tolerance = {"float32": 1e-5, "bfloat16": 5e-2}[precision]
    torch.testing.assert_close(states, whole, rtol=tolerance, atol=tolerance)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


def test_batches_within_the_limit_are_computed_at_once():
    whole, expected, _ = gradients(None)
    states, found, tokens = gradients(len(LENGTHS) * max(LENGTHS))
    assert len(tokens) == 1 and torch.equal(states, whole)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
