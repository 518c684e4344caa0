"""Whatever dies, the curve is the undisturbed one."""

import os
import signal
import threading
from uuid import uuid4

import pytest
import yaml

from rayk.config import Replicas, TeacherConfig, parse_config
from rayk.errors import TeacherUnavailable
from rayk.run import Watcher, distill
from rayk.teachers import serve_teacher
from rayk.training.checkpoint import CheckpointStore
from tests.runs import actors, assert_same_learning, curve, metrics, processes, rayk, settings, until

LONG = {"steps": 80, "batch_size": 16, "checkpoint_every_steps": 10, "learning_rate": 1e-3}


class Striking(Watcher):
    """Strikes once, after the given step, from the thread that watches."""

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


def write(path, values):
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def mark():
    """An environment variable that everything a test starts inherits; at the end nothing of it may be left."""
    variable = {"RAYK_TEST_MARK": uuid4().hex}
    yield variable
    for process in processes(**variable):
        process.kill()


def test_a_killed_driver_costs_nothing_but_time(tmp_path, tiny_student, mark):
    whole, killed = (prepared(tmp_path, name, tiny_student) for name in ("whole", "killed"))
    distill(parse_config(whole))
    killed["training"]["workers"] = 2
    path = write(tmp_path / "run.yaml", killed)
    with rayk("run", path, log=tmp_path / "first.log", **mark) as process:
        until(lambda: len(metrics(killed["output"])) >= 35, "step 35", process)
        os.killpg(process.pid, signal.SIGKILL)
    reached = metrics(killed["output"])[-1]["step"]
    assert 35 <= reached < 80
    until(lambda: not processes(**mark), "the end of its workers")
    with rayk("run", path, "--resume", "--set", "training.workers=0", log=tmp_path / "second.log", **mark) as process:
        assert process.wait() == 0, (tmp_path / "second.log").read_text()
    assert_same_learning(whole["output"], killed["output"], 1e-3)


def test_ctrl_c_takes_everything_down_and_says_so_in_one_sentence(tmp_path, tiny_student, tiny_teacher, mark):
    values = prepared(tmp_path, "stopped", tiny_student, "logit_kd", workers=1, steps=100_000)
    values["teachers"] = [{"name": "own", "model": tiny_teacher, "resources": {"num_cpus": 0.5}}]
    with rayk("run", write(tmp_path / "run.yaml", values), log=tmp_path / "log", **mark) as process:
        until(lambda: len(metrics(values["output"])) >= 15, "step 15", process)
        os.killpg(process.pid, signal.SIGINT)
        until(lambda: process.poll() is not None, "the end of the run")
    lines = (tmp_path / "log").read_text().splitlines()
    assert process.returncode == 130, lines
    assert lines[-1] == "rayk: Interrupted; what was checkpointed can be continued with --resume."
    assert not [line for line in lines[:-1] if not line.startswith("  ")], lines
    until(lambda: not processes(**mark), "the end of its processes")
    assert CheckpointStore(f"{values['output']}/checkpoints").latest() is not None


def test_a_killed_worker_costs_nothing_but_time(tmp_path, tiny_student, ray_cluster):
    whole, hurt = (prepared(tmp_path, name, tiny_student) for name in ("whole", "hurt"))
    distill(parse_config(whole))
    hurt["training"]["workers"] = 2
    killed = []

    def strike():
        killed.append(actors("RayTrainWorker")[-1])
        killed[0].kill()

    watcher = Striking(35, strike)
    distill(parse_config(hurt), watcher=watcher)
    assert watcher.struck.is_set()
    assert_same_learning(whole["output"], hurt["output"], 1e-3)


@pytest.fixture(scope="module")
def mortal(ray_cluster, tiny_teacher):
    """A teacher of its own for tests that kill: its settings."""
    return TeacherConfig(name="mortal", model=tiny_teacher, resources={"num_cpus": 0.25})


def of(values, teacher, **changes):
    return parse_config(values | {"teachers": [{"name": teacher, "attach": True, **changes}]})


def test_a_killed_replica_costs_nothing_but_time(tmp_path, tiny_student, served, mortal):
    whole, hurt = (prepared(tmp_path, name, tiny_student, "logit_kd") for name in ("whole", "hurt"))
    distill(of(whole, "served"))
    watcher = Striking(20, lambda: actors("ServeReplica:mortal:")[0].kill())
    with serve_teacher(mortal.model_copy(update={"replicas": Replicas(min=2, max=2)})):
        distill(of(hurt, "mortal"), watcher=watcher)
    assert watcher.struck.is_set()
    assert_same_learning(whole["output"], hurt["output"])


def test_without_its_teacher_a_run_stops_at_a_checkpoint_and_goes_on_later(tmp_path, tiny_student, served, mortal):
    from ray import serve

    whole, stopped = (prepared(tmp_path, name, tiny_student, "logit_kd") for name in ("whole", "stopped"))
    distill(of(whole, "served"))
    stopped["training"]["workers"] = 2
    settings = of(stopped, "mortal", deadline_seconds=3)
    watcher = Striking(20, lambda: serve.delete("mortal"))
    with serve_teacher(mortal), pytest.raises(TeacherUnavailable, match="Teacher 'mortal' did not answer within 3 s"):
        distill(settings, watcher=watcher)
    reached = curve(stopped["output"], "step")[-1]
    assert 20 <= reached < 80
    assert CheckpointStore(f"{stopped['output']}/checkpoints").steps()[-1] == reached
    stopped["training"]["workers"] = 0
    with serve_teacher(mortal):
        distill(of(stopped, "mortal"), resume=True)
    assert_same_learning(whole["output"], stopped["output"])
