"""Stored signals are small, and differ from the originals only by the documented error."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayk.config.support import Hidden, Logprob, Sampled, TopK
from rayk.signals.batch import SignalBatch, concatenate
from rayk.signals.codec import pack, unpack
from rayk.signals.wire import CorruptSignal, decode, encode
from tests.fuzz.limits import bounded_memory
from tests.signals.test_batch import SPREADS, coarse, logits_of, signals_of


def stored(signals: SignalBatch) -> SignalBatch:
    lengths = signals.offsets.diff().tolist()
    return concatenate([
        unpack(entry, signals.support, tokens) for entry, tokens in zip(pack(signals), lengths, strict=True)
    ])  # fmt: skip


def assert_equal(one: SignalBatch, other: SignalBatch) -> None:
    assert (one.support, one.vocab_size) == (other.support, other.vocab_size)
    for name in ("offsets", "target_logprobs", "ids", "logprobs", "log_tails", "weights", "entropies", "hidden"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert mine is theirs or torch.equal(mine, theirs), name


@st.composite
def topk_signals(draw):
    vocab_size = draw(st.sampled_from([3, 50, 300, 70_000]))
    lengths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    support = TopK(draw(st.integers(1, min(vocab_size, 12))), draw(st.sampled_from([(1.0,), (0.5, 1.0, 4.0)])))
    spread = draw(st.sampled_from([*SPREADS.values(), 30_000.0]))
    return signals_of(logits_of(sum(lengths), vocab_size, spread, draw(st.integers(0, 99))), support, lengths)


@given(topk_signals())
@settings(max_examples=60, deadline=None)
def test_a_top_k_row_changes_only_by_rounded_log_probs(signals):
    back = stored(signals)
    assert not back.invalid_rows()
    assert_equal(replace(back, logprobs=None), replace(signals, logprobs=None))
    within = (8 - signals.logprobs.clamp(min=-65504, max=0)) / 128 * 1.0001
    assert bool(((back.logprobs - signals.logprobs.clamp(min=-65504)).abs() <= within).all())
    assert_equal(stored(back), back)


@pytest.mark.parametrize("support", [Logprob(), Sampled(7), Sampled(5, tau=0.8, seed=3), Hidden(), Hidden("float32")])
@pytest.mark.parametrize("lengths", [[6], [2, 0, 4], [0]])
def test_other_supports_are_stored_as_in_the_wire_format(support, lengths):
    tokens = sum(lengths)
    random = np.random.default_rng(0)
    target, columns = -torch.rand(tokens), {}
    if isinstance(support, Sampled):
        ids = np.array([random.permutation(40)[: support.draws] for _ in range(tokens)]).reshape(tokens, support.draws)
        columns = {
            "ids": torch.from_numpy(ids), "entropies": torch.rand(tokens),
            "weights": torch.full((tokens, support.draws), 1 / support.draws),
        }  # fmt: skip
    elif isinstance(support, Hidden):
        columns = {"hidden": torch.randn(tokens, 8).to(getattr(torch, support.dtype))}
    signals = SignalBatch(support, torch.tensor([0, *np.cumsum(lengths)]), target, 40, **columns)
    assert_equal(stored(signals), decode(encode(signals)))


@pytest.mark.parametrize("spread", SPREADS.values(), ids=SPREADS.keys())
@pytest.mark.parametrize("vocab_size", [1_000, 32_000, 65_536])
def test_bytes_and_error_of_an_entry(vocab_size, spread):
    logits = logits_of(128, vocab_size, spread)
    signals = decode(encode(signals_of(logits, TopK(64))))
    entries = pack(signals)
    assert sum(map(len, entries)) / signals.logprobs.numel() <= 2.5
    back = unpack(entries[0], TopK(64), 128)
    ours = torch.cat([back.at_temperature()[0], back.at_temperature()[1][:, None]], dim=1).double()
    exact = coarse(logits.double().log_softmax(1), back.ids)
    assert -1e-6 < (exact.exp() * (exact - ours)).sum(1).mean() < 1e-3
    assert -1e-6 < (ours.exp() * (ours - exact)).sum(1).mean() < 1e-3


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("alike", [1, 2, 8, 64, 200])
def test_the_error_is_bounded_with_all_mass_on_few_tokens(alike, temperature):
    """All probability is on `alike` tokens, so that rounding affects the largest probabilities."""
    logits = logits_of(200, 400, 1.0)
    logits[:, :alike] += 20
    signals = signals_of(logits, TopK(64, (1.0, temperature)))
    (p, p_tail), (q, q_tail) = (each.at_temperature(temperature) for each in (signals, stored(signals)))
    p, q = torch.cat([p, p_tail[:, None]], dim=1).double(), torch.cat([q, q_tail[:, None]], dim=1).double()
    assert (p.exp() * (p - q)).sum(1).mean() < 1e-3
    assert (q.exp() * (q - p)).sum(1).mean() < 1e-3


def test_impossible_tokens_are_stored_as_in_the_wire_format():
    logits = logits_of(4, 10, 1.0)
    logits[:, 5:] = float("-inf")
    back = stored(decode(encode(signals_of(logits, TopK(8)))))
    assert not back.invalid_rows()
    assert bool((back.logprobs[:, 5:] < -60_000).all())


def test_an_entry_of_another_kind_is_refused():
    topk, logprob = (pack(signals_of(logits_of(5, 30, 1.0), support))[0] for support in (TopK(4), Logprob()))
    for entry, support in [(topk, TopK(5)), (topk, Logprob()), (logprob, TopK(4)), (logprob, Hidden()), (b"", TopK(4))]:
        with pytest.raises(CorruptSignal):
            unpack(entry, support, 5)


def test_an_entry_that_declares_other_sizes_is_refused_without_memory():
    topk, hidden = (pack(signals_of(logits_of(5, 30, 1.0), support))[0] for support in (TopK(4), Hidden()))
    most = b"\xff\xff\xff\xff"
    hostile = [(most + topk[4:], TopK(4)), (topk[:4] + most + topk[8:], TopK(4)), (most + hidden[4:], Hidden())]
    for entry, support in hostile:
        with bounded_memory(), pytest.raises(CorruptSignal):
            unpack(entry, support, 5, hidden_size=5)
    with pytest.raises(CorruptSignal):
        unpack(topk, TopK(4), 4)
    with pytest.raises(CorruptSignal):
        unpack(topk + b"\0", TopK(4), 5)


def test_an_entry_with_unusable_numbers_is_refused():
    signals = signals_of(logits_of(5, 30, 1.0), Logprob())
    signals.target_logprobs[2] = float("nan")
    with pytest.raises(CorruptSignal, match="log-prob of NaN"):
        unpack(pack(signals)[0], Logprob(), 5)
