"""The simulated engine returns valid signals and completions after the configured time."""

import asyncio
import time

import pytest
import torch

from rayk.config import SimulatedEngineConfig
from rayk.config.support import Hidden, Logprob, TopK
from rayk.engines.base import SamplingParameters
from rayk.engines.simulated import SimulatedEngine
from rayk.errors import InputError
from tests.engines.reference import VOCAB, sequence

SEQUENCES = [sequence(20, 1), sequence(30, 2)]


@pytest.fixture(scope="module")
def engine(tiny_teacher):
    settings = SimulatedEngineConfig(tokens_per_second=500.0, generated_tokens_per_second=100.0)
    return SimulatedEngine(tiny_teacher, settings)


def test_signals_are_valid_and_take_their_time(engine):
    start = time.monotonic()
    signals = asyncio.run(engine.score(SEQUENCES, TopK(8, (1.0, 2.0))))
    assert time.monotonic() - start >= 50 / 500
    assert not signals.invalid_rows()
    assert signals.offsets.diff().tolist() == [one.counted_tokens for one in SEQUENCES]
    assert all(len(set(row)) == 8 for row in signals.ids.tolist())
    log_p, log_tail = signals.at_temperature()
    torch.testing.assert_close(log_p.exp().sum(1) + log_tail.exp(), torch.ones(signals.tokens))
    assert asyncio.run(engine.score(SEQUENCES, Logprob())).ids is None


def test_completions_depend_on_the_seed_and_have_full_length(engine):
    start = time.monotonic()
    parameters = SamplingParameters(max_new_tokens=5)
    first, second = asyncio.run(engine.generate(["the cat", "the dog"], parameters, [3, 4]))
    assert time.monotonic() - start >= 10 / 100
    [again] = asyncio.run(engine.generate(["the cat"], parameters, [3]))
    assert first.token_ids.tolist() == again.token_ids.tolist() != second.token_ids.tolist()
    assert (len(first.token_ids), len(first.logprobs), first.finish_reason) == (5, 5, "length")
    assert first.token_ids.max() < VOCAB


def test_hidden_states_are_refused(engine):
    with pytest.raises(InputError, match="cannot return support 'hidden', only topk, logprob"):
        asyncio.run(engine.score(SEQUENCES, Hidden()))
    with pytest.raises(InputError, match="has no weights"):
        engine.head()
