"""Replicas that are killed, as by SIGKILL, the memory killer or a lost node, cost time and nothing else."""

import asyncio

import numpy as np
import pytest
from ray import serve

from rayk.engines.transformers import TransformersEngine
from rayk.support import TopK
from rayk.teachers import connect_teacher
from tests.teachers.asking import assert_alike, eventually, replicas_of, sequences_of

pytestmark = pytest.mark.cluster


def running_replicas():
    application = serve.status().applications["served"]
    running = application.deployments["teacher"].replica_states.get("RUNNING", 0)
    return running if application.status == "RUNNING" else 0


@pytest.fixture
def teacher(served):
    """A fresh asker of the served teacher; at the end the teacher is whole again."""
    yield connect_teacher("served")
    eventually(lambda: running_replicas() == 2 and len(replicas_of("served")) == 2, seconds=120)


def test_a_stream_over_two_kills_is_whole_right_and_in_order(teacher, tiny_teacher):
    batches = [sequences_of(16, seed=i, shortest=200, longest=500) for i in range(40)]
    victims = replicas_of("served")
    assert len(victims) == 2
    received = []
    for position, (batch, signals) in enumerate(teacher.stream(batches, TopK(16), prefetch=8)):
        received.append((batch, signals))
        if position in (5, 20):
            retries = teacher.statistics.retries
            victims.pop().kill()
        if position in (19, 39):
            assert teacher.statistics.retries > retries, "nothing was under way in the replica that was killed"
    assert [id(batch) for batch, _ in received] == [id(batch) for batch in batches]
    engine = TransformersEngine(tiny_teacher)
    for batch, signals in received:
        assert_alike(signals, asyncio.run(engine.score(batch, TopK(16))))
    assert teacher.statistics.tokens == sum(s.counted_tokens for batch in batches for s in batch), "none counts twice"


def test_generation_over_a_kill_is_the_undisturbed_one(teacher):
    prompts = [np.full(4, 4 + i) for i in range(256)]
    parameters = {"max_new_tokens": 100, "temperature": 1.0, "seed": 5}
    undisturbed = teacher.generate(prompts, **parameters)
    disturbed = connect_teacher("served")

    async def main():
        asking = asyncio.create_task(asyncio.to_thread(disturbed.generate, prompts, **parameters))
        while disturbed.statistics.calls < 8:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        replicas_of("served")[0].kill()
        return await asking

    completions = asyncio.run(main())
    assert disturbed.statistics.retries > 0, "nothing was under way in the replica that was killed"
    for one, other in zip(completions, undisturbed, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
