"""A process removes only the teachers that it deployed, or that a killed process has left."""

import subprocess
import sys

import pytest
import ray
from ray import serve

from rayk.config.support import TopK
from rayk.errors import InputError
from rayk.serving.ownership import ORPHAN_VARIABLE
from rayk.teachers import serve_teacher
from rayk.teachers.serve import detach_teacher, remove_teacher
from tests.runs import PATIENCE_SECONDS, environment, wait_until
from tests.teachers.helpers import random_sequences, teacher_config

SCRIPT = """
import os, sys
from rayk.config import TeacherConfig
from rayk.teachers import serve_teacher
from rayk.teachers.serve import detach_teacher

config, end = TeacherConfig.model_validate_json(sys.argv[1]), sys.argv[2]
if end == "detached":
    teacher = detach_teacher(config)
    print("generated", len(teacher.generate(["the cat"], max_new_tokens=2)), flush=True)
else:
    with serve_teacher(config) as teacher:
        print("generated", len(teacher.generate(["the cat"], max_new_tokens=2)), flush=True)
        if end == "killed":
            os.kill(os.getpid(), 9)
"""


@pytest.fixture
def serve_elsewhere(ray_cluster):
    """Function that serves a teacher in another process of this cluster until the end of that process."""

    def run(config, end, **variables):
        address = ray.get_runtime_context().gcs_address
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, config.model_dump_json(), end], capture_output=True, text=True,
            env=environment(RAY_ADDRESS=address, **variables), timeout=PATIENCE_SECONDS, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (-9 if end == "killed" else 0, "generated 1\n"), done.stderr

    return run


def is_running(name):
    found = serve.status().applications.get(name)
    return found is not None and found.status == "RUNNING"


@pytest.mark.long
def test_teacher_of_a_running_process_stays(serve_elsewhere, tiny_teacher):
    config = teacher_config("owned", tiny_teacher)
    with serve_teacher(config) as teacher:
        serve_elsewhere(config, "finished")
        assert is_running("owned")
        assert teacher.score(random_sequences(2), TopK(4)).tokens
    assert "owned" not in serve.status().applications


@pytest.mark.long
def test_teacher_of_a_killed_process_is_taken_over_once_and_removed(serve_elsewhere, tiny_teacher):
    """Its new owner is not the process that deployed it, so a third one must not remove it either."""
    config = teacher_config("left", tiny_teacher)
    serve_elsewhere(config, "killed")
    assert is_running("left")
    with serve_teacher(config) as teacher:
        serve_elsewhere(config, "finished")
        assert is_running("left")
        assert teacher.score(random_sequences(2), TopK(4)).tokens
    wait_until(lambda: "left" not in serve.status().applications, "the end of the teacher")


@pytest.mark.long
def test_teacher_that_nobody_takes_over_removes_itself(serve_elsewhere, tiny_teacher):
    config = teacher_config("orphan", tiny_teacher)
    serve_elsewhere(config, "killed", **{ORPHAN_VARIABLE: "2"})
    wait_until(lambda: "orphan" not in serve.status().applications, "the end of the teacher")
    with serve_teacher(config) as teacher:  # the name may be used again
        assert teacher.score(random_sequences(2), TopK(4)).tokens


@pytest.mark.long
def test_detached_teacher_stays_until_it_is_removed(serve_elsewhere, tiny_teacher):
    config = teacher_config("detached", tiny_teacher)
    serve_elsewhere(config, "detached", **{ORPHAN_VARIABLE: "0.1"})
    with serve_teacher(config) as teacher:
        assert teacher.score(random_sequences(2), TopK(4)).tokens
    assert is_running("detached")
    with pytest.raises(InputError, match="A detached teacher needs a Ray cluster that outlives this process"):
        detach_teacher(config)
    remove_teacher("detached")
    assert "detached" not in serve.status().applications
