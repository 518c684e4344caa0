"""A process removes only the teachers that it deployed, or that a killed process has left."""

import subprocess
import sys

import pytest
import ray
from ray import serve

from rayk.config.support import TopK
from rayk.teachers import serve_teacher
from tests.runs import PATIENCE_SECONDS, environment, wait_until
from tests.teachers.helpers import random_sequences, teacher_config

SCRIPT = """
import os, sys
from rayk.config import TeacherConfig
from rayk.teachers import serve_teacher

with serve_teacher(TeacherConfig.model_validate_json(sys.argv[1])) as teacher:
    print("generated", len(teacher.generate(["the cat"], max_new_tokens=2)), flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), 9)
"""


@pytest.fixture
def serve_elsewhere(ray_cluster):
    """Function that serves a teacher in another process of this cluster until the end of that process."""

    def run(config, end):
        address = ray.get_runtime_context().gcs_address
        return subprocess.run(
            [sys.executable, "-c", SCRIPT, config.model_dump_json(), end], capture_output=True, text=True,
            env=environment(RAY_ADDRESS=address), timeout=PATIENCE_SECONDS, check=False,
        )  # fmt: skip

    return run


def test_teacher_of_a_running_process_stays(serve_elsewhere, tiny_teacher):
    config = teacher_config("owned", tiny_teacher)
    with serve_teacher(config) as teacher:
        other = serve_elsewhere(config, "finished")
        assert (other.returncode, other.stdout) == (0, "generated 1\n"), other.stderr
        assert serve.status().applications["owned"].status == "RUNNING"
        assert teacher.score(random_sequences(2), TopK(4)).tokens
    assert "owned" not in serve.status().applications


def test_teacher_of_a_killed_process_is_taken_over_and_removed(serve_elsewhere, tiny_teacher):
    config = teacher_config("left", tiny_teacher)
    other = serve_elsewhere(config, "killed")
    assert (other.returncode, other.stdout) == (-9, "generated 1\n"), other.stderr
    assert serve.status().applications["left"].status == "RUNNING"
    with serve_teacher(config) as teacher:
        assert teacher.score(random_sequences(2), TopK(4)).tokens
    wait_until(lambda: "left" not in serve.status().applications, "the end of the teacher")
