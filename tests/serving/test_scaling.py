"""The number of replicas follows the tokens that requesters wait for; teachers run on the simulated engine."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray import serve

from rayk.config import SimulatedEngineConfig
from rayk.config.support import Hidden, Logprob, TopK
from rayk.engines.base import SamplingParameters
from rayk.engines.simulated import SimulatedEngine
from rayk.errors import InputError
from rayk.serving import application
from rayk.serving.application import count_replicas
from rayk.serving.autoscaling import METRIC, Demand, Requester, WaitingTokensPolicy
from rayk.signals.wire import decode, encode
from rayk.teachers import serve_teacher
from tests.runs import wait_until
from tests.teachers.helpers import random_sequences, teacher_config


@pytest.mark.parametrize("support", [TopK(16), TopK(64, (1.0, 2.0)), Logprob()], ids=str)
def test_simulated_signals_are_valid_and_of_real_size(tiny_teacher, support):
    engine = SimulatedEngine(tiny_teacher, SimulatedEngineConfig(tokens_per_second=1e6))
    sequences = random_sequences(20)
    signals = decode(encode(asyncio.run(engine.score(sequences, support))))
    assert not signals.invalid_rows()
    assert signals.offsets.diff().tolist() == [one.counted_tokens for one in sequences]
    if isinstance(support, TopK):
        assert all(len(set(row)) == support.k for row in signals.ids.tolist())
        total = signals.logprobs.exp().sum(1) + signals.log_tails[:, 0].exp()
        np.testing.assert_allclose(total, 1.0, atol=1e-3)


def test_simulated_text_has_its_length_and_depends_on_its_seed(tiny_teacher):
    engine = SimulatedEngine(tiny_teacher, SimulatedEngineConfig(generated_tokens_per_second=1e6))
    prompts = [one.input_ids for one in random_sequences(3)]
    first, again = (asyncio.run(engine.generate(prompts, SamplingParameters(9), [1, 2, 3])) for _ in range(2))
    assert [len(one.token_ids) for one in first] == [9] * 3
    assert [one.token_ids.tolist() for one in first] == [one.token_ids.tolist() for one in again]
    with pytest.raises(InputError, match="'hidden'"):
        asyncio.run(engine.score(random_sequences(1), Hidden()))


def test_replica_counts_the_tokens_that_requesters_wait_for():
    demand = Demand()
    with demand.track_request(Requester("a", 500), 100), demand.track_request(Requester("b", 40), 40):
        assert demand.waiting_tokens() == 540
        with demand.track_request(Requester("a", 700), 200):
            assert demand.waiting_tokens() == 740
        assert demand.waiting_tokens() == 540
    assert demand.waiting_tokens() == 400
    with demand.track_request(None, 10):
        assert demand.waiting_tokens() == 400


def context(current, waiting, requests=1.0, running=True):
    reported = {METRIC: {f"replica {i}": value for i, value in enumerate(waiting)}}
    return SimpleNamespace(
        target_num_replicas=current, aggregated_metrics=reported, total_num_requests=requests,
        running_replicas=["replica"] * running * current,
    )  # fmt: skip


def test_number_of_replicas_follows_waiting_tokens():
    def replicas(current, *waiting, **others):
        return WaitingTokensPolicy(100)(context(current, waiting, **others))[0]

    assert replicas(1, 350) == 4
    assert replicas(2, 350, 0) == 4  # a new replica has seen no requester yet
    assert replicas(4, 350) == 4
    assert replicas(4, 150) == 4  # they keep up; fewer might not
    assert replicas(4, 90) == 3
    assert replicas(1, 10) == 1
    assert replicas(1, 0, requests=0.0) == 0
    assert replicas(1, requests=0.0, running=False) == 1  # it is still loading
    assert replicas(0, requests=0.0) == 0
    assert replicas(0, requests=2.0) == 1


@given(st.integers(0, 50), st.floats(0, 1e7), st.integers(1, 10**6))
def test_more_waiting_tokens_never_need_fewer_replicas(current, waiting, tokens):
    few, many = (WaitingTokensPolicy(tokens)(context(current, [w]))[0] for w in (waiting, waiting * 2 + 1))
    assert few <= many


@pytest.mark.cluster
@pytest.mark.long
def test_replicas_scale_up_with_demand_and_down_to_zero(ray_cluster, tiny_teacher, monkeypatch):
    monkeypatch.setattr(application, "_REPORT_SECONDS", 1.0)
    monkeypatch.setattr(application, "_LOOK_BACK_SECONDS", 1.5)
    config = teacher_config(
        "elastic", tiny_teacher, engine={"kind": "simulated", "tokens_per_second": 150.0}, call_tokens=64,
        replicas={"min": 0, "max": 3, "waiting_tokens": 400, "up_seconds": 0.5, "down_seconds": 2}, in_flight=2,
        resources={"num_cpus": 0.1},
    )  # fmt: skip
    with serve_teacher(config) as teacher:

        def batches():
            """Yield batches until the client counts three replicas."""
            for seed in range(200):
                if teacher._credit._replicas == 3:
                    return
                yield random_sequences(5, seed, shortest=20)

        most = 0
        for batch, signals in teacher.stream(batches(), TopK(8), 12):
            assert signals.offsets.diff().tolist() == [one.counted_tokens for one in batch]
            most = max(most, count_replicas("elastic"))
        assert most == 3
        assert teacher._credit._replicas == 3
        wait_until(lambda: count_replicas("elastic") == 0, seconds=60)
        assert serve.status().applications["elastic"].status == "RUNNING"
        assert teacher.score(random_sequences(2), TopK(8)).tokens  # a replica starts for the request
