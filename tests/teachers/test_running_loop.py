"""Blocking calls work in a thread with a running event loop, as in a notebook or under `asyncio.run`."""

import asyncio
import subprocess
import sys

import pytest

from rayk.config import parse_config
from rayk.config.support import TopK
from rayk.run import distill
from rayk.teachers import connect_teacher, serve_teacher
from tests.runs import PATIENCE_SECONDS, environment, metrics, settings
from tests.teachers.helpers import random_sequences, teacher_config


def run_in_loop(function, *arguments):
    """Call a blocking function in a coroutine, so that its thread has a running event loop."""

    async def main():
        assert asyncio.get_running_loop().is_running()
        return function(*arguments)

    return asyncio.run(main())


def use_teacher(config):
    with serve_teacher(config) as teacher:
        connected = connect_teacher(config.name)
        batches = [random_sequences(2, seed=seed) for seed in range(3)]
        signals = connected.score(batches[0], TopK(8))
        streamed = [batch_signals.tokens for _, batch_signals in teacher.stream(batches, TopK(8))]
        completions = teacher.generate(["the cat"], max_new_tokens=3)
        assert teacher.usage() is None
    return signals.tokens, streamed, len(completions)


def test_teachers_are_served_and_queried_in_a_running_loop(ray_cluster, tiny_teacher):
    tokens, streamed, completions = run_in_loop(use_teacher, teacher_config("in-a-loop", tiny_teacher))
    assert streamed[0] == tokens
    assert (len(streamed), completions) == (3, 1)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.long
def test_a_run_with_its_own_teacher_works_in_a_running_loop(workers, ray_cluster, tmp_path, tiny_student, tiny_teacher):
    values = settings(tmp_path, tiny_student, "logit_kd", workers=workers, steps=2)
    values["teachers"] = [{"name": "own", "model": tiny_teacher, "resources": {"num_cpus": 0.25}}]
    result = run_in_loop(distill, parse_config(values))
    assert [row["step"] for row in metrics(result.output)] == [1, 2]


SCRIPT = """
import asyncio, sys
import rayk

async def main():
    with rayk.serve_teacher(rayk.TeacherConfig(name="cold", model=sys.argv[1], resources={"num_cpus": 0.5})) as teacher:
        print("generated", len(teacher.generate(["the cat"], max_new_tokens=2)))

asyncio.run(main())
"""


@pytest.mark.cluster
@pytest.mark.long
def test_a_process_with_a_running_loop_starts_ray(tiny_teacher):
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, tiny_teacher], capture_output=True, text=True, env=environment(),
        timeout=PATIENCE_SECONDS, check=False,
    )  # fmt: skip
    assert (process.returncode, process.stdout, process.stderr) == (0, "generated 1\n", "")
