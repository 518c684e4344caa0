"""Throughput of a teacher by its number of replicas, and a student's waiting time at 1.2 times the needed capacity.

    python -m tests.benchmarks.speed.scaling [--replicas 1,2,4,8,16] [--students 2]

Replicas run the simulated engine: a fixed number of tokens per second each, with 20 ms of latency and signals of the
real size (k=64). Students request signals from processes of their own, as Ray Train workers do. So the benchmark
measures Ray Serve, encoding, the client's credit and routing, even on few cores. How to read it: "times one" should be
close to the number of replicas, "waiting" close to 0.
"""

import argparse
import os
import tempfile
import time

from rayk.environment import set_threading

set_threading()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_worker_niceness", "0")

import numpy as np  # noqa: E402
import ray  # noqa: E402

from rayk.config import TeacherConfig  # noqa: E402
from rayk.config.support import TopK  # noqa: E402
from rayk.serving.cluster import start_ray  # noqa: E402
from rayk.signals.sequence import TokenSequence  # noqa: E402
from rayk.teachers import connect_teacher, serve_teacher  # noqa: E402
from tests.benchmarks.machine import machine  # noqa: E402
from tests.benchmarks.speed.service import make_teacher  # noqa: E402

RATE, LENGTH, BATCH_ROWS, SUPPORT = 1_500.0, 256, 8, TopK(64)


def batch(seed: int) -> list[TokenSequence]:
    random = np.random.default_rng(seed)
    counted = np.arange(LENGTH) >= LENGTH // 2
    return [TokenSequence(random.integers(2, 32_000, LENGTH).astype(np.int32), counted) for _ in range(BATCH_ROWS)]


@ray.remote(num_cpus=0)
def student(name: str, batches: int, prefetch: int, step_seconds: float) -> tuple[float, float, float]:
    """Request `batches` with a step of `step_seconds` after each; return (start, end, seconds waited)."""
    teacher = connect_teacher(name)
    teacher.score(batch(0), SUPPORT)
    time.sleep(4)  # the client counts replicas every three seconds
    began, waited = time.time(), 0.0
    answers = teacher.stream((batch(number) for number in range(batches)), SUPPORT, prefetch)
    for number in range(batches):
        requested = time.time()
        next(answers)
        if number >= 3 * prefetch:
            waited += time.time() - requested
        time.sleep(step_seconds)
    return began, time.time(), waited


def throughput(replicas: int, students: int) -> float:
    """Return the tokens per second of all students together if they never pause."""
    batches = 6 * replicas // students + 6
    results = [student.remote("simulated", batches, 4 * replicas, 0.0) for _ in range(students)]
    began, ended, _ = zip(*ray.get(results), strict=True)
    return students * batches * BATCH_ROWS * LENGTH / (max(ended) - min(began))


def waiting_share(replicas: int, students: int) -> float:
    """Return the share of its time that a student waits for a teacher with 1.2 times the needed capacity."""
    demand = RATE * replicas / 1.2 / students
    step, prefetch, batches = BATCH_ROWS * LENGTH / demand, 4 * max(1, replicas // students), 0
    batches = 3 * prefetch + int(20 / step)
    results = [student.remote("simulated", batches, prefetch, step) for _ in range(students)]
    results = ray.get(results)
    measured = (batches - 3 * prefetch) * step
    return sum(waited for *_, waited in results) / len(results) / (measured + results[0][2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", default="1,2,4,8,16")
    parser.add_argument("--students", type=int, default=2)
    given = parser.parse_args()
    print(f"{machine()}, load before {os.getloadavg()[0]:.1f}")
    print(
        f"{given.students} students, {RATE:,.0f} tokens/s a replica, {BATCH_ROWS} rows of {LENGTH} tokens, half counted"
    )
    start_ray(8)
    alone = None
    with tempfile.TemporaryDirectory() as folder:
        make_teacher(folder)
        for count in map(int, given.replicas.split(",")):
            config = TeacherConfig(
                name="simulated", model=folder, replicas=count, resources={"num_cpus": 0.05},
                engine={"kind": "simulated", "tokens_per_second": RATE, "latency_seconds": 0.02},
                call_tokens=2 * LENGTH,
            )  # fmt: skip
            began = time.time()
            with serve_teacher(config):
                up = time.time() - began
                speed = throughput(count, given.students)
                alone = alone or speed / count
                waited = waiting_share(count, given.students)
            print(
                f"  {count:2} replicas (up in {up:3.0f} s): {speed:7,.0f} tokens/s, {speed / alone:5.2f} times one, "
                f"{speed / RATE / count:.0%} of what they can; waiting at 1.2 times the demand: {waited:.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
