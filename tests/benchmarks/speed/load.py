"""Load held: a teacher under a constant number of requests, for as long as wanted.

    python -m tests.benchmarks.speed.load [--minutes 60] [--requests 64]

One replica of the model of `service` (llama 256×4, V=32,000) scores rows of 200 to 400 tokens with k=64; whenever a
request is answered, the next one is sent. Ten times, the command prints what the time since the reading before has
brought: rows per second, the median and 99th percentile of a request's time, repeated calls, and the private memory
(USS), threads and open files of client and replica. How to read it: later lines should equal the first one.
"""

import argparse
import asyncio
import itertools
import tempfile
import time

import numpy as np
import psutil

from rayk.config import TeacherConfig, TransformersEngineConfig
from rayk.config.support import TopK
from rayk.serving.event_loop import run_in_background
from rayk.signals.sequence import TokenSequence
from rayk.teachers import Teacher, serve_teacher
from tests.benchmarks.machine import machine
from tests.benchmarks.speed.service import THREADS, K, make_rows, make_teacher
from tests.teachers.helpers import replica_processes

READINGS = 10


async def hold(teacher: Teacher, rows: list[TokenSequence], requests: int, until: float, seconds: list[float]) -> None:
    """Keep `requests` requests in flight until the monotonic time `until`; append the seconds that each took."""
    following = itertools.cycle(rows)

    async def send() -> None:
        while (began := time.monotonic()) < until:
            signals = await teacher.ascore([next(following)], TopK(K))
            assert signals.tokens > 0
            seconds.append(time.monotonic() - began)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(requests):
            tasks.create_task(send())


def state_of(process: psutil.Process) -> str:
    """Return private memory in MB, threads and open files."""
    size = process.memory_full_info().uss / 1e6
    return f"{size:.0f}, {process.num_threads()}, {process.num_fds()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--requests", type=int, default=64, help="in flight at once")
    given = parser.parse_args()
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        make_teacher(folder)
        engine = TransformersEngineConfig(threads=THREADS)
        config = TeacherConfig(
            name="load", model=folder, engine=engine, resources={"num_cpus": 1}, in_flight=given.requests
        )
        with serve_teacher(config) as teacher:
            [replica] = replica_processes("load")
            client = psutil.Process()
            rows = make_rows(256, 0.5)
            print(
                "| minutes | rows/s | seconds a request, median | 99th percentile | repeated calls "
                "| client: private MB, threads, files | replica |\n|---|---|---|---|---|---|---|"
            )
            span = 60 * given.minutes / READINGS
            for reading in range(1, READINGS + 1):
                seconds: list[float] = []
                run_in_background(hold(teacher, rows, given.requests, time.monotonic() + span, seconds)).result()
                median, most = np.percentile(seconds, [50, 99])
                print(
                    f"| {reading * span / 60:.1f} | {len(seconds) / span:.1f} | {median:.2f} | {most:.2f} | "
                    f"{teacher.statistics.retries} | {state_of(client)} | {state_of(replica)} |", flush=True,
                )  # fmt: skip


if __name__ == "__main__":
    main()
