"""Killed processes do not change the results of a run."""

import os
import signal
import threading
from uuid import uuid4

import pytest
import yaml

from rayk.config import Replicas, TeacherConfig, parse_config
from rayk.errors import TeacherUnavailable
from rayk.run import ProgressListener, distill
from rayk.teachers import serve_teacher
from rayk.training.checkpoint import CheckpointStore
from tests.runs import actor_processes, assert_same_learning, curve, metrics, processes, rayk, settings, wait_until

SPARED = ("DatasetManager", "PlacementGroupCleaner", "PreemptionWatcher", "_AutoscalingCoordinatorActor")
"""Processes of Ray Train that a run on its own cluster does not start."""
LONG = {"steps": 80, "batch_size": 16, "checkpoint_every_steps": 10, "learning_rate": 1e-3}


class Striking(ProgressListener):
    """Call `strike` once, after the given step, on the thread that follows the progress."""

    def __init__(self, step, strike):
        self.step, self.strike, self.struck = step, strike, threading.Event()

    def steps(self, rows, total):
        if rows[-1]["step"] >= self.step and not self.struck.is_set():
            assert rows[-1]["step"] < total, "the run was over before it could be disturbed"
            self.strike()
            self.struck.set()


def prepared(tmp_path, name, student, method="supervised", **training):
    (tmp_path / name).mkdir()
    return settings(tmp_path / name, student, method, **LONG | training)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_student):
    """The undisturbed run, in this process."""
    values = prepared(tmp_path_factory.mktemp("undisturbed"), "whole", tiny_student)
    return distill(parse_config(values)).output


@pytest.fixture(scope="module")
def undisturbed_with_teacher(tmp_path_factory, tiny_student, served):
    """The undisturbed run with a teacher."""
    values = prepared(tmp_path_factory.mktemp("undisturbed"), "whole", tiny_student, "logit_kd")
    return distill(of(values, "served")).output


def write(path, values):
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def mark():
    """An environment variable that all processes of a test inherit; the remaining ones are killed at the end."""
    variable = {"RAYK_TEST_MARK": uuid4().hex}
    yield variable
    for process in processes(**variable):
        process.kill()


def test_killed_driver_changes_no_result(tmp_path, tiny_student, undisturbed, mark):
    killed = prepared(tmp_path, "killed", tiny_student, workers=1)
    path = write(tmp_path / "run.yaml", killed)
    with rayk("run", path, log=tmp_path / "first.log", **mark) as process:
        wait_until(lambda: len(metrics(killed["output"])) >= 35, "step 35", process)
        os.killpg(process.pid, signal.SIGKILL)
    reached = metrics(killed["output"])[-1]["step"]
    assert 35 <= reached < 80
    wait_until(lambda: not processes(**mark), "the end of its workers")
    killed["training"]["workers"] = 0
    distill(parse_config(killed), resume=True)
    assert_same_learning(undisturbed, killed["output"], 1e-3)


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.nightly), signal.SIGTERM], ids=["ctrl-c", "sigterm"]
)
def test_a_signal_to_its_group_ends_a_run_with_one_sentence(tmp_path, tiny_student, tiny_teacher, mark, number):
    values = prepared(tmp_path, "stopped", tiny_student, "logit_kd", workers=1, steps=100_000)
    values["teachers"] = [{"name": "own", "model": tiny_teacher, "resources": {"num_cpus": 0.5}}]
    with rayk("run", write(tmp_path / "run.yaml", values), log=tmp_path / "log", **mark) as process:
        wait_until(lambda: len(metrics(values["output"])) >= 15, "step 15", process)
        os.killpg(process.pid, number)
        wait_until(lambda: process.poll() is not None, "the end of the run")
    lines = (tmp_path / "log").read_text().splitlines()
    assert process.returncode == 130, lines
    saved = CheckpointStore(f"{values['output']}/checkpoints").steps()[-1]
    assert saved == metrics(values["output"])[-1]["step"]  # the last finished step, not the last that was due
    assert lines[-1] == f"rayk: Interrupted; the run is checkpointed at step {saved:,}. Continue it with --resume."
    stopping = "Stopping after the current step with a checkpoint; interrupt again to stop at once."
    assert [line for line in lines[:-1] if not line.startswith("  ")] == [stopping], lines
    wait_until(lambda: not processes(**mark), "the end of its processes")
    assert CheckpointStore(f"{values['output']}/checkpoints").manifest(saved) is not None


def test_killed_worker_changes_no_result(tmp_path, tiny_student, undisturbed, ray_cluster):
    disturbed = prepared(tmp_path, "hurt", tiny_student, workers=2)
    running = {}

    def strike():
        running.update({title: actor_processes(title) for title in ("TrainController", "RayTrainWorker", *SPARED)})
        running["RayTrainWorker"][-1].kill()

    listener = Striking(35, strike)
    distill(parse_config(disturbed), listener=listener)
    assert listener.struck.is_set()
    assert {title: len(found) for title, found in running.items() if found} == {
        "TrainController": 1,
        "RayTrainWorker": 2,
    }
    assert_same_learning(undisturbed, disturbed["output"], 1e-3)


class StrikingAgain(ProgressListener):
    """Kill the worker after every 20 steps of progress, if there is one."""

    def __init__(self):
        self.struck_at = [0]

    def steps(self, rows, total):
        step = rows[-1]["step"]
        if self.struck_at[-1] + 20 <= step < total and (workers := actor_processes("RayTrainWorker")):
            workers[-1].kill()
            self.struck_at.append(step)


@pytest.mark.nightly
def test_failures_after_a_new_checkpoint_are_counted_anew(tmp_path, tiny_student, undisturbed, ray_cluster):
    slow = {"micro_batch_tokens": 40}
    disturbed = prepared(tmp_path, "hurt", tiny_student, workers=1, max_failures=1, **slow)
    listener = StrikingAgain()
    distill(parse_config(disturbed), listener=listener)
    assert len(listener.struck_at) >= 4, "with max_failures 1, the second failure of one group ends its training"
    assert_same_learning(undisturbed, disturbed["output"], 1e-3)


@pytest.mark.nightly
def test_hung_worker_changes_no_result(tmp_path, tiny_student, undisturbed, mark):
    """After SIGSTOP a worker holds its connections, so the other one waits for it without an error."""
    hung = prepared(tmp_path, "hung", tiny_student, workers=2)
    path, patience = write(tmp_path / "run.yaml", hung), {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "6"}
    with rayk("run", path, log=tmp_path / "log", **mark, **patience) as process:
        wait_until(lambda: len(metrics(hung["output"])) >= 35, "step 35", process)
        stopped = actor_processes("RayTrainWorker", process.pid)[-1]
        stopped.send_signal(signal.SIGSTOP)
        wait_until(lambda: process.poll() is not None, "the end of the run")
    assert process.returncode == 0
    assert_same_learning(undisturbed, hung["output"], 1e-3)


@pytest.fixture(scope="module")
def mortal(ray_cluster, tiny_teacher):
    """Settings of a separate teacher for tests that kill replicas."""
    return TeacherConfig(name="mortal", model=tiny_teacher, resources={"num_cpus": 0.25})


def of(values, teacher, **changes):
    return parse_config(values | {"teachers": [{"name": teacher, "attach": True, **changes}]})


def test_killed_replica_changes_no_result(tmp_path, tiny_student, undisturbed_with_teacher, mortal):
    disturbed = prepared(tmp_path, "hurt", tiny_student, "logit_kd")
    listener = Striking(20, lambda: actor_processes("ServeReplica:mortal:")[0].kill())
    with serve_teacher(mortal.model_copy(update={"replicas": Replicas(min=2, max=2)})):
        distill(of(disturbed, "mortal"), listener=listener)
    assert listener.struck.is_set()
    assert_same_learning(undisturbed_with_teacher, disturbed["output"])


def test_run_without_its_teacher_stops_at_a_checkpoint(tmp_path, tiny_student, undisturbed_with_teacher, mortal):
    from ray import serve

    stopped = prepared(tmp_path, "stopped", tiny_student, "logit_kd", workers=2)
    settings = of(stopped, "mortal", deadline_seconds=3)
    listener = Striking(20, lambda: serve.delete("mortal"))
    with serve_teacher(mortal), pytest.raises(TeacherUnavailable, match="Teacher 'mortal' did not answer within 3 s"):
        distill(settings, listener=listener)
    reached = curve(stopped["output"], "step")[-1]
    assert 20 <= reached < 80
    assert CheckpointStore(f"{stopped['output']}/checkpoints").steps()[-1] == reached
    stopped["training"]["workers"] = 0
    with serve_teacher(mortal):
        distill(of(stopped, "mortal"), resume=True)
    assert_same_learning(undisturbed_with_teacher, stopped["output"])
