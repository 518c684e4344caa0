"""States of layers on the wire: the error that is stated, all types, and states that cannot be sent."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayk.config.support import Hidden, Layers, bytes_per_token
from rayk.errors import InputError
from rayk.models import Head
from rayk.signals.batch import COLUMNS, SignalBatch, concatenate
from rayk.signals.codec import pack, unpack
from rayk.signals.layer_states import compress_states, expand_states
from rayk.signals.wire import CorruptSignal, decode, encode
from tests.fuzz.limits import bounded_memory
from tests.signals.test_wire import EXTRA, renewed, with_number
from tests.signals.test_wire import WIDTH as WIDTH_PLACE

WIDTH, VOCAB = 70, 40


def signals_of(support, tokens=6, width=WIDTH, magnitude=1.0):
    random = torch.Generator().manual_seed(0)
    states = magnitude * torch.randn(tokens, support.count, width, generator=random)
    stored, scales = compress_states(states, support.dtype)
    final = torch.randn(tokens, 8, generator=random).to(getattr(torch, support.final)) if support.final else None
    return states, SignalBatch(
        support, torch.tensor([0, tokens // 2, tokens]), -torch.rand(tokens, generator=random), VOCAB, hidden=final,
        layers=stored, layer_scales=scales,
    )  # fmt: skip


@given(st.integers(1, 100), st.sampled_from([1e-6, 1.0, 1e5, 1e30]), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_number_is_off_by_less_than_0_4_percent_of_the_largest_of_its_block(width, magnitude, seed):
    random = torch.Generator().manual_seed(seed)
    states = magnitude * torch.randn(3, width, generator=random)
    states[0, ::37] *= 500  # as the few large features of a transformer
    states[1] = 0
    found = expand_states(*compress_states(states, "int8"))
    for one, other in zip(states.split(32, dim=1), found.split(32, dim=1), strict=True):
        assert bool(((one - other).abs() <= 0.004 * one.abs().amax(dim=1, keepdim=True)).all())


@pytest.mark.parametrize("tokens", [6, 0])
@pytest.mark.parametrize("dtype", ["int8", "float16", "bfloat16", "float32"])
@pytest.mark.parametrize("layers", [3, (1, 4, 1)])
@pytest.mark.parametrize("final", [None, "float16", "float32"])
@pytest.mark.parametrize("part", ["output", "attention"])
def test_all_types_survive_the_wire_and_the_disk(tokens, dtype, layers, final, part):
    support = Layers(layers, dtype, final, part)
    _, signals = signals_of(support, tokens)
    stored = concatenate([unpack(entry, support, tokens // 2) for entry in pack(signals)])
    for back in (decode(encode(signals)), stored):
        assert back.support == support
        for name in COLUMNS:
            mine, theirs = getattr(back, name), getattr(signals, name)
            assert mine is theirs or (mine.dtype == theirs.dtype and torch.equal(mine, theirs)), name
    assert len(signals.select([1])) == 1


def test_bytes_a_token_are_as_stated():
    for support in (Layers(3), Layers((0, 2), "bfloat16"), Layers(1, "int8", "float16"), Layers(1, part="attention")):
        _, small = signals_of(support, 100, 3 * 64 if support.part == "attention" else 64)
        small = small if small.hidden is None else replace(small, hidden=small.hidden.repeat(1, 8))
        assert encode(small).nbytes == pytest.approx(100 * bytes_per_token(support, VOCAB, 64), abs=100)


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_states_that_are_not_finite_are_named(dtype):
    for value in (torch.nan, torch.inf):
        states, signals = signals_of(Layers(2, dtype))
        states[4, 1, 3] = value
        stored, scales = compress_states(states, dtype)
        assert list(replace(signals, layers=stored, layer_scales=scales).invalid_rows()) == [1]
    assert list(signals_of(Layers(2, dtype), magnitude=1e6)[1].invalid_rows()) == ([0, 1] if dtype == "float16" else [])


def test_final_states_are_a_hidden_signal():
    _, signals = signals_of(Layers(2, final="float32"))
    head = Head(torch.randn(VOCAB, 8))
    hidden = replace(signals, head=head).as_hidden()
    assert (hidden.support, hidden.layers) == (Hidden("float32"), None)
    assert torch.equal(hidden.logits(), head.logits(signals.hidden))
    with pytest.raises(InputError, match="no final hidden states"):
        signals_of(Layers(2))[1].as_hidden()
    with pytest.raises(InputError, match="request support 'layers'"):
        hidden.layer_states(0)


@pytest.mark.parametrize("tokens", [6, 0])
@pytest.mark.parametrize(
    ("place", "number", "form"),
    [
        (WIDTH_PLACE, 0, "<I"),
        (WIDTH_PLACE, 2**32 - 1, "<I"),
        (EXTRA, 0, "<Q"),
        (EXTRA, 2**64 - 1, "<Q"),
        (EXTRA, 2**33, "<Q"),
    ],
)
def test_a_signal_that_contradicts_itself_is_refused_without_memory(tokens, place, number, form):
    _, signals = signals_of(Layers(2), tokens)
    hostile = renewed(with_number(encode(signals).tobytes(), place, number, form))
    with bounded_memory(), pytest.raises(CorruptSignal):
        decode(hostile)


def test_an_empty_selection_is_encoded():
    signals = signals_of(Layers(2, final="float16"), width=5)[1].select([])
    assert len(decode(encode(signals))) == 0
