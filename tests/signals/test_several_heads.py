"""Signals of several teachers in one batch: each position is read with its own teacher's head."""

import pytest
import torch

from rayk.config.support import Hidden, TopK
from rayk.models import Head
from rayk.signals.batch import SignalBatch, concatenate

VOCABULARY = 11


def hidden_signals(lengths, width, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    states = torch.randn(tokens, width, generator=generator)
    head = Head(torch.randn(columns, width, generator=generator), torch.randn(columns, generator=generator))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return SignalBatch(Hidden("float32"), offsets, torch.zeros(tokens), VOCABULARY, hidden=states, head=head)


def test_logits_are_those_of_each_rows_own_head():
    first, second = hidden_signals([2, 3], 4, 12, 0), hidden_signals([1, 2], 6, 14, 1)
    joint = concatenate([first.select([1]), second, first.select([0])])
    expected = torch.full((8, 14), -torch.inf)
    expected[:3, :12], expected[3:6], expected[6:, :12] = first.logits()[2:], second.logits(), first.logits()[:2]
    assert torch.equal(joint.logits(), expected)
    order = [3, 0, 2]
    rows = [expected[joint.offsets[row] : joint.offsets[row + 1]] for row in order]
    torch.testing.assert_close(joint.select(order).to("cpu").logits(), torch.cat(rows))
    torch.testing.assert_close(joint.slice_tokens(slice(2, 5)).logits(), expected[2:5])
    # A head keeps its identity, so that batches with the same teachers do not collect copies of it.
    again = concatenate([joint, second, concatenate([first, second])])
    assert all(own is one for own, one in zip(again.heads, (first.head, second.head), strict=True))
    torch.testing.assert_close(again.logits()[8:11], second.logits())


def test_one_head_stays_one_head():
    one = hidden_signals([2, 3], 4, 12, 0)
    joint = concatenate([one.select([1]), one.select([0])])
    assert joint.head is one.head and joint.head_of is None


@pytest.mark.parametrize("k", [1, 3, 6])
def test_dropped_ids_join_the_tail_at_every_temperature(k):
    logits, temperatures = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 3, (1.0, 2.0)

    def signals(count):
        log_p = logits.log_softmax(1)
        ids = log_p.topk(count).indices
        tails = [(log_p / t).scatter(1, ids, -torch.inf).logsumexp(1) for t in temperatures]
        return SignalBatch(
            TopK(count, temperatures), torch.tensor([0, 5]), log_p[:, 0], VOCABULARY, ids, log_p.gather(1, ids),
            torch.stack(tails, 1),
        )  # fmt: skip

    kept, expected = signals(6).keep_likeliest(k), signals(k)
    assert kept.support == expected.support and torch.equal(kept.ids, expected.ids)
    torch.testing.assert_close(kept.logprobs, expected.logprobs)
    torch.testing.assert_close(kept.log_tails, expected.log_tails)
    assert signals(k).keep_likeliest(6).ids.shape[1] == k
