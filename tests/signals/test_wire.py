"""Hostile signals: each contradicts itself behind a checksum that fits, and is refused before it takes memory."""

import struct
import zlib

import pytest

from rayk.config.support import Hidden, Logprob, Sampled, TopK
from rayk.signals.wire import CorruptSignal, decode, encode
from tests.fuzz.limits import bounded_memory
from tests.signals.test_batch import logits_of, signals_of

CODE, ROWS, TOKENS, WIDTH, TEMPERATURES, TAU, EXTRA = 8, 12, 16, 20, 28, 32, 40
"""Places of the header's numbers."""
FIRST_LENGTH = 48


def wire_of(support) -> bytes:
    return encode(signals_of(logits_of(5, 30, 2.0), support, [2, 3])).tobytes()


def renewed(data: bytes) -> bytes:
    return data[:4] + struct.pack("<I", zlib.crc32(data[8:])) + data[8:]


def with_number(data: bytes, place: int, number: float, form: str = "<I") -> bytes:
    return data[:place] + struct.pack(form, number) + data[place + struct.calcsize(form) :]


@pytest.mark.parametrize(
    ("support", "place", "number", "form"),
    [
        (Logprob(), CODE, 9, "<I"), (Logprob(), ROWS, 2**32 - 1, "<I"), (Logprob(), TOKENS, 2**32 - 1, "<I"),
        (Logprob(), TOKENS, 4, "<I"), (Logprob(), FIRST_LENGTH, 2**32 - 1, "<I"), (Logprob(), FIRST_LENGTH, 1, "<I"),
        (TopK(4), WIDTH, 200_000_000, "<I"), (TopK(4), WIDTH, 2**32 - 1, "<I"), (TopK(4), EXTRA, 5, "<Q"),
        (TopK(4), TEMPERATURES, 2**32 - 1, "<I"), (TopK(4), FIRST_LENGTH + 8 + 20, float("nan"), "<d"),
        (Sampled(7), WIDTH, 200_000_000, "<I"), (Sampled(7), WIDTH, 0, "<I"), (Sampled(7), WIDTH, 1, "<I"),
        (Sampled(7), TAU, float("nan"), "<d"), (Sampled(7), TAU, -1.0, "<d"),
        (Hidden(), WIDTH, 2**32 - 1, "<I"), (Hidden(), WIDTH, 0, "<I"), (Hidden(), EXTRA, 3, "<Q"),
        (Hidden(), EXTRA, 2**64 - 1, "<Q"),
    ],
)  # fmt: skip
def test_a_signal_that_contradicts_itself_is_refused_without_memory(support, place, number, form):
    hostile = renewed(with_number(wire_of(support), place, number, form))
    with bounded_memory(), pytest.raises(CorruptSignal):
        decode(hostile)


def test_bytes_after_the_last_column_are_refused():
    with pytest.raises(CorruptSignal, match="more bytes than"):
        decode(renewed(wire_of(TopK(4)) + b"\0"))
