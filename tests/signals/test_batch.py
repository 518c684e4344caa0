from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rayk.config.support import Hidden, Logprob, Requested, Sampled, TopK
from rayk.engines.reduce import reduce_logits
from rayk.errors import InputError
from rayk.models import DTYPES, Head
from rayk.signals.batch import COLUMNS, SignalBatch, concatenate
from rayk.signals.wire import CorruptSignal, decode, encode

SPREADS = {"flat": 0.02, "moderate": 2.0, "peaked": 8.0, "one-hot": 60.0}


def logits_of(tokens, vocab_size, spread, seed=0):
    return torch.randn(tokens, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


def signals_of(logits, support, lengths=None):
    """Return an engine's signals for dense logits [tokens, vocab]; the target at position i is token i mod vocab."""
    tokens, vocab_size = logits.shape
    targets = torch.arange(tokens) % vocab_size
    offsets = torch.tensor([0, *np.cumsum(lengths if lengths is not None else [tokens])])
    if isinstance(support, Hidden):
        hidden = (logits[:, :5] if vocab_size > 5 else logits).to(DTYPES[support.dtype])
        return SignalBatch(support, offsets, logits.log_softmax(1)[:, 0], vocab_size, hidden=hidden)
    asked, generator = None, torch.Generator().manual_seed(0)
    if isinstance(support, Requested):
        asked = torch.randint(-1, vocab_size, (tokens, 3), generator=generator)
    if isinstance(support, Sampled):
        asked = torch.rand(tokens, support.draws, generator=generator, dtype=torch.float64)
    columns = reduce_logits(logits.clone(), targets, support, vocab_size, asked)
    return SignalBatch(support, offsets, vocab_size=vocab_size, **columns)


def equal(a, b):
    pairs = [(getattr(a, name), getattr(b, name)) for name in ("offsets", *COLUMNS)]
    same = all(x is y or torch.equal(x, y) for x, y in pairs)
    return same and a.support == b.support and a.vocab_size == b.vocab_size


def coarse(dense, ids):
    """Return the log-probs of `ids` and of all other tokens together, [tokens, k + 1], from dense log-probs."""
    inside = dense.gather(1, ids)
    rest = dense.scatter(1, ids, float("-inf")).logsumexp(1, keepdim=True)
    return torch.cat([inside, rest], dim=1)


@st.composite
def batches(draw):
    vocab_size = draw(st.sampled_from([3, 50, 70_000]))
    lengths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=5))
    temperatures = draw(st.sampled_from([(1.0,), (1.0, 2.0), (0.5, 1.0, 4.0)]))
    k = draw(st.integers(1, min(vocab_size, 12)))
    supports = [
        TopK(k, temperatures), Logprob(), Requested(k - 1, temperatures), Sampled(k), Sampled(k, tau=0.8, seed=7),
        Hidden("float16"), Hidden("bfloat16"), Hidden("float32"),
    ]  # fmt: skip
    support = draw(st.sampled_from(supports))
    logits = logits_of(
        sum(lengths), vocab_size, draw(st.sampled_from(list(SPREADS.values()))), draw(st.integers(0, 99))
    )
    return signals_of(logits, support, lengths)


@given(batches())
@settings(max_examples=150, deadline=None)
def test_a_round_trip_changes_only_rounding(signals):
    back = decode(encode(signals))
    assert not back.invalid_rows()
    assert equal(replace(back, logprobs=None), replace(signals, logprobs=None))
    if signals.logprobs is not None:
        torch.testing.assert_close(back.logprobs, signals.logprobs, rtol=2**-11, atol=2**-24)
    assert equal(decode(encode(back)), back)


@given(batches(), st.data())
@settings(max_examples=60, deadline=None)
def test_select_and_concatenate_move_whole_rows(signals, data):
    rows = data.draw(st.lists(st.integers(0, len(signals) - 1), max_size=7))
    chosen = signals.select(rows)
    assert len(chosen) == len(rows)
    for position, row in enumerate(rows):
        entries = slice(signals.offsets[row], signals.offsets[row + 1])
        mine = slice(chosen.offsets[position], chosen.offsets[position + 1])
        for name in COLUMNS:
            if getattr(signals, name) is not None:
                assert torch.equal(getattr(chosen, name)[mine], getattr(signals, name)[entries])
    apart = [signals.select([row]) for row in range(len(signals))]
    assert equal(concatenate(apart), signals)
    assert equal(concatenate([signals, chosen]).select(range(len(signals))), signals)


@pytest.mark.parametrize(("vocab_size", "a_probability"), [(32_000, 4), (65_536, 4), (65_537, 6), (128_000, 6)])
@pytest.mark.parametrize("k", [1, 16, 64])
def test_bytes_per_token(vocab_size, a_probability, k):
    tokens = 16
    offsets = torch.tensor([0, tokens])
    ids = torch.arange(vocab_size - k, vocab_size).expand(tokens, k)
    logprobs = torch.full((tokens, k), -5.0)
    signals = SignalBatch(TopK(k), offsets, logprobs[:, 0].clone(), vocab_size, ids, logprobs, logprobs[:, :1].clone())
    assert len(encode(signals)) <= tokens * (a_probability * k + 16)
    assert torch.equal(decode(encode(signals)).ids, ids)


def test_bytes_per_token_of_logprob_support():
    signals = signals_of(logits_of(200, 100, 1.0), Logprob())
    assert len(encode(signals)) <= 200 * 5


@pytest.mark.parametrize("spread", SPREADS.values(), ids=SPREADS.keys())
@pytest.mark.parametrize("vocab_size", [1_000, 32_000])
def test_error_of_the_round_trip(vocab_size, spread):
    logits = logits_of(200, vocab_size, spread)
    back = decode(encode(signals_of(logits, TopK(64))))
    ours = torch.cat([back.at_temperature()[0], back.at_temperature()[1][:, None]], dim=1).double()
    exact = coarse(logits.double().log_softmax(1), back.ids)
    forward = (exact.exp() * (exact - ours)).sum(1)
    reverse = (ours.exp() * (ours - exact)).sum(1)
    assert -1e-6 < forward.mean() < 1e-3
    assert -1e-6 < reverse.mean() < 1e-3


def test_the_tail_of_peaked_rows_is_not_derived_from_rounded_log_probs():
    logits = torch.full((4, 100), -12.0)
    logits[:, 0] = torch.tensor([8.0, 4.0, 20.0, 60.0])
    exact = coarse(logits.double().log_softmax(1), torch.zeros(4, 1, dtype=torch.long))[:, 1]
    back = decode(encode(signals_of(logits, TopK(1))))
    torch.testing.assert_close(back.log_tails[:, 0].double(), exact, rtol=1e-5, atol=1e-5)
    derived = torch.log1p(-back.logprobs.exp().sum(1))
    assert not torch.allclose(derived.double(), exact, atol=0.1), "the case is too easy: the derived tail is accurate"


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_temperature_of_a_full_support_equals_the_dense_softmax(temperature):
    logits = logits_of(30, 40, 3.0)
    log_p, log_tail = signals_of(logits, TopK(40, (0.5, 1.0, 2.0, 4.0))).at_temperature(temperature)
    ids = signals_of(logits, TopK(40)).ids
    torch.testing.assert_close(log_p, (logits / temperature).log_softmax(1).gather(1, ids), atol=1e-5, rtol=1e-5)
    assert bool(log_tail.isneginf().all())


@pytest.mark.parametrize("spread", SPREADS.values(), ids=SPREADS.keys())
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_temperature_of_a_sparse_support_equals_the_coarse_grained_softmax(temperature, spread):
    logits = logits_of(30, 200, spread)
    signals = signals_of(logits, TopK(8, (0.5, 1.0, 2.0, 4.0)))
    log_p, log_tail = signals.at_temperature(temperature)
    exact = coarse((logits.double() / temperature).log_softmax(1), signals.ids)
    torch.testing.assert_close(torch.cat([log_p, log_tail[:, None]], dim=1).double(), exact, atol=1e-4, rtol=1e-5)


def test_a_temperature_that_the_signal_lacks_is_refused():
    signals = signals_of(logits_of(3, 10, 1.0), TopK(4, (1.0, 2.0)))
    with pytest.raises(InputError, match=r"does not contain temperature 3 .*has 1, 2.*'temperatures'"):
        signals.at_temperature(3.0)


def test_logprob_support_has_no_distribution():
    with pytest.raises(InputError, match="'topk'"):
        signals_of(logits_of(3, 10, 1.0), Logprob()).at_temperature()


@given(st.integers(0, 10_000), st.integers(1, 255))
@settings(max_examples=200, deadline=None)
def test_one_damaged_byte_is_detected(position, change):
    wire = encode(signals_of(logits_of(5, 30, 2.0), TopK(6), [2, 3])).copy()
    wire[position % len(wire)] ^= change
    with pytest.raises(CorruptSignal):
        decode(wire)


@given(st.integers(1, 10_000))
@settings(max_examples=50, deadline=None)
def test_a_truncated_signal_is_detected(missing):
    wire = encode(signals_of(logits_of(5, 30, 2.0), TopK(6), [2, 3]))
    with pytest.raises(CorruptSignal):
        decode(wire[: max(0, len(wire) - missing)])


def test_read_only_bytes_decode_to_writable_signals():
    wire = encode(signals_of(logits_of(5, 30, 2.0), TopK(6)))
    wire.setflags(write=False)
    back = decode(wire)
    for column in (back.offsets, back.target_logprobs, back.ids, back.logprobs, back.log_tails):
        column += 1


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("target_logprobs", float("nan"), "an actual token with a log-prob of NaN"),
        ("target_logprobs", float("-inf"), "an actual token with a log-prob of NaN, of -inf"),
        ("target_logprobs", 0.5, "above 0"),
        ("logprobs", float("nan"), "a log-prob of NaN"),
        ("log_tails", float("nan"), "a tail of NaN"),
        ("log_tails", float("inf"), "a tail of NaN or +inf"),
        ("ids", 30, "a token id outside the vocabulary of 30"),
    ],
)
@pytest.mark.parametrize(("entry", "row"), [(0, 0), (1, 0), (2, 2), (4, 2), (5, 4)])
def test_invalid_numbers_are_found_with_their_row(column, value, said, entry, row):
    signals = signals_of(logits_of(6, 30, 2.0), TopK(6), [2, 0, 3, 0, 1])
    assert not signals.invalid_rows()
    damaged = getattr(signals, column).clone()
    damaged[entry] = value
    [(found, reason)] = decode(encode(replace(signals, **{column: damaged}))).invalid_rows().items()
    assert found == row
    assert said in reason


def test_impossible_tokens_stay_finite_in_the_wire_format():
    logits = logits_of(4, 10, 1.0)
    logits[:, 5:] = float("-inf")
    back = decode(encode(signals_of(logits, TopK(8))))
    assert not back.invalid_rows()
    assert bool(back.logprobs.isfinite().all())
    assert bool((back.at_temperature()[0].exp().sum(1) - 1 < 1e-5).all())


class CountCopies(TorchDispatchMode):
    """Counts the tensors of a shape that are copied to another device or type."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        result = function(*arguments, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and result.shape == self.shape:
            self.count += 1
        return result


def test_the_head_is_copied_to_a_device_once_for_all_steps_and_micro_batches():
    head = Head(torch.randn(50, 5, dtype=torch.bfloat16))
    steps = [signals_of(logits_of(8, 50, 2.0, seed), Hidden(dtype="bfloat16"), [3, 4, 1]) for seed in (0, 1)]
    with CountCopies(head.weight.shape) as copies:
        for signals in steps:
            for rows in ([0], [1], [2]):
                part = replace(signals, head=head).select(rows).to("meta")
                assert part.head.weight.device.type == "meta"
    assert copies.count == 1
