"""A replica that hangs (SIGSTOP): its requests go to another one, and Serve replaces it."""

import asyncio
import signal

import psutil
import pytest

from rayk.config.support import TopK
from rayk.engines.transformers import TransformersEngine
from rayk.teachers import serve_teacher
from tests.runs import wait_until
from tests.teachers.helpers import assert_signals_close, random_sequences, replica_processes, teacher_config

pytestmark = pytest.mark.cluster


@pytest.mark.long
def test_requests_of_a_stopped_replica_are_answered_by_another_which_replaces_it(ray_cluster, tiny_teacher):
    batches = [random_sequences(8, seed=seed) for seed in range(12)]
    config = teacher_config("hangs", tiny_teacher, replicas=2, call_tokens=64, deadline_seconds=30)
    with serve_teacher(config) as teacher:
        wait_until(lambda: len(replica_processes("hangs")) == 2, seconds=60)
        stopped = replica_processes("hangs")[0]
        stopped.send_signal(signal.SIGSTOP)
        answers = [signals for _, signals in teacher.stream(batches, TopK(16), prefetch=8)]
        assert stopped.status() == psutil.STATUS_STOPPED  # Serve has not ended it yet
        assert teacher.statistics.asked_again > 0
        engine = TransformersEngine(tiny_teacher)
        for batch, signals in zip(batches, answers, strict=True):
            assert_signals_close(signals, asyncio.run(engine.score(batch, TopK(16))))
        wait_until(lambda: not stopped.is_running() or stopped.status() == psutil.STATUS_ZOMBIE, seconds=180)
        wait_until(lambda: len(replica_processes("hangs")) == 2, seconds=120)


@pytest.mark.nightly
def test_the_time_in_which_the_only_replica_loads_again_does_not_count(ray_cluster, tiny_teacher):
    engine = {"kind": "simulated", "start_seconds": 20, "tokens_per_second": 1e6}
    config = teacher_config("slow-start", tiny_teacher, engine=engine, deadline_seconds=10)
    with serve_teacher(config) as teacher:
        batch = random_sequences(4)
        assert teacher.score(batch, TopK(16)).tokens
        [replica] = replica_processes("slow-start")
        replica.kill()
        signals = teacher.score(batch, TopK(16))  # the new replica is ready after 20 s at the earliest
        assert signals.tokens == sum(one.counted_tokens for one in batch)
        assert replica_processes("slow-start")[0].pid != replica.pid
