"""Killed replicas (SIGKILL, out of memory, a lost node) cost time but change no result."""

import asyncio

import numpy as np
import pytest
from ray import serve

from rayk.config.support import TopK
from rayk.engines.transformers import TransformersEngine
from rayk.teachers import connect_teacher
from tests.runs import wait_until
from tests.teachers.helpers import assert_signals_close, random_sequences, replica_processes

pytestmark = pytest.mark.cluster


def running_replicas():
    application = serve.status().applications["served"]
    running = application.deployments["teacher"].replica_states.get("RUNNING", 0)
    return running if application.status == "RUNNING" else 0


def is_complete():
    return running_replicas() == 2 and len(replica_processes("served")) == 2


@pytest.fixture
def teacher(served):
    """A new client of the served teacher; at the end both replicas run again."""
    yield connect_teacher("served")
    wait_until(is_complete, seconds=120)


@pytest.mark.long
def test_replica_death_loses_no_batch(teacher, tiny_teacher):
    requested, received = [], []
    kills, before, next_kill = 0, None, 5

    def batches():
        """Yield batches until two kills have hit a replica that was answering a request."""
        while len(requested) < 20 or (kills < 2 and len(requested) < 300):
            requested.append(random_sequences(16, seed=len(requested), shortest=200, longest=500))
            yield requested[-1]

    for answer in teacher.stream(batches(), TopK(16), prefetch=8):
        received.append(answer)
        if before is not None and teacher.statistics.retries > before:
            kills, before = kills + 1, None
        if kills < 2 and len(received) >= next_kill and (victims := replica_processes("served")):
            before, next_kill = teacher.statistics.retries, len(received) + 12
            victims[0].kill()
    assert kills == 2
    assert [id(batch) for batch, _ in received] == [id(batch) for batch in requested]
    engine = TransformersEngine(tiny_teacher)
    for batch, signals in received:
        assert_signals_close(signals, asyncio.run(engine.score(batch, TopK(16))))
    assert teacher.statistics.tokens == sum(s.counted_tokens for batch in requested for s in batch), (
        "no signal is counted twice"
    )


def test_replica_death_changes_no_completion(teacher):
    prompts = [np.full(4, 4 + i) for i in range(256)]
    parameters = {"max_new_tokens": 100, "temperature": 1.0, "seed": 5}
    undisturbed = teacher.generate(prompts, **parameters)

    async def disturbed(client):
        task = asyncio.create_task(asyncio.to_thread(client.generate, prompts, **parameters))
        while client.statistics.calls < 8:
            await asyncio.sleep(0.01)
        replica_processes("served")[0].kill()
        return await task

    for _ in range(6):  # until a kill has hit a replica that was answering
        wait_until(is_complete, seconds=120)
        client = connect_teacher("served")
        completions = asyncio.run(disturbed(client))
        for one, other in zip(completions, undisturbed, strict=True):
            assert one.token_ids.tolist() == other.token_ids.tolist()
            assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
        if client.statistics.retries:
            return
    pytest.fail("no kill hit a replica that was answering")
