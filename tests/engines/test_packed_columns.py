"""Packed columns: what is packed is unpacked, with the rounding of the wire format."""

import asyncio
from dataclasses import replace

import pytest
import torch

from rayk.config.support import Hidden, Logprob, Requested, Sampled, TopK
from rayk.engines.packed_columns import pack_columns, row_bytes, unpack_columns
from rayk.engines.transformers import TransformersEngine
from rayk.signals.batch import COLUMNS
from rayk.signals.wire import decode, encode
from tests.engines.reference import sequence, with_requested_ids


@pytest.fixture(scope="module")
def engine(tiny_teacher):
    return TransformersEngine(tiny_teacher)


@pytest.mark.parametrize("vocab_size", [356, 1 << 20])
@pytest.mark.parametrize(
    "support", [TopK(7, (1.0, 2.0)), Requested(2), Sampled(9, 0.8), Logprob(), Hidden(), Hidden("bfloat16")], ids=str
)
def test_columns_are_unpacked_as_the_wire_format_decodes_them(engine, support, vocab_size):
    sequences = with_requested_ids([sequence(9, 1), sequence(40, 2)], 3)
    signals = asyncio.run(engine.score(sequences, support))
    columns = {name: column for name in COLUMNS if (column := getattr(signals, name)) is not None}
    if "ids" in columns:
        columns["ids"] = columns["ids"] + vocab_size - 356  # the highest ids
        signals = replace(signals, ids=columns["ids"], vocab_size=vocab_size)
    if isinstance(support, TopK):
        columns["logprobs"][0, -1] = float("-inf")
    packed = pack_columns(columns, support, vocab_size)
    asked = 3 if isinstance(support, Requested) else 0
    assert packed.shape == (signals.tokens, row_bytes(support, vocab_size, asked, 32))
    unpacked, expected = unpack_columns(packed, support, vocab_size, asked, 32), decode(encode(signals))
    for name, column in unpacked.items():
        wire = getattr(expected, name)
        assert column.dtype == wire.dtype
        if isinstance(support, Sampled) and name in ("ids", "weights"):
            wire = columns[name]  # the wire format leaves out ids of weight 0
        assert torch.equal(column, wire), name
    assert unpacked.keys() == columns.keys()


def test_another_number_of_bytes_is_refused():
    with pytest.raises(ValueError, match="a row has 5 bytes instead of 4"):
        unpack_columns(torch.zeros(2, 5, dtype=torch.uint8), Logprob(), 100)
