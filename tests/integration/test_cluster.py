"""A cluster that another process has started: submitted jobs, and served teachers that other processes use."""

import json
import os
import signal
import subprocess
import sys

import pytest
import yaml
from transformers import AutoModelForCausalLM

from rayk.training.checkpoint import CheckpointStore
from tests.clusters import LocalCluster
from tests.runs import PATIENCE_SECONDS, actor_processes, environment, metrics, rayk, run_rayk, settings, wait_until

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def head():
    """A separate cluster of one node."""
    with LocalCluster() as cluster:
        cluster.start_head(cpus=8)
        yield cluster


def write(path, values):
    path.write_text(yaml.safe_dump(values))
    return path


def submit(head, folder, *arguments, wait=True, **variables):
    """Submit `rayk …` as a job with these environment variables; return what `ray job submit` has printed."""
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "job", "submit", f"--address={head.dashboard}",
        f"--working-dir={folder}", f"--runtime-env-json={json.dumps({'env_vars': variables})}",
        *([] if wait else ["--no-wait", "--submission-id=stopped"]),
        "--", sys.executable, "-m", "rayk.cli", *arguments,
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=2 * PATIENCE_SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def teachers(tiny_teacher, *names, **changes):
    return [{"name": name, "model": tiny_teacher, "resources": {"num_cpus": 0.5}, **changes} for name in names]


def test_submitted_job_completes(head, tmp_path, tiny_student, tiny_teacher):
    values = settings(tmp_path, tiny_student, "logit_kd", workers=1, steps=4)
    values["teachers"] = teachers(tiny_teacher, "own")
    job = tmp_path / "job"
    job.mkdir()
    write(job / "run.yaml", values)
    assert "succeeded" in submit(head, job, "run", "run.yaml")
    run = tmp_path / "run"
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4]
    for name in ("config.yaml", "summary.json", "report.html"):
        assert (run / name).is_file()
    AutoModelForCausalLM.from_pretrained(run / "model")


@pytest.mark.nightly
def test_stopped_job_is_resumed_and_leaves_only_detached_teachers(head, tmp_path, tiny_student, tiny_teacher):
    """Ray kills a job three seconds after `ray job stop`, whatever it still has to do. The slow teacher keeps the run
    from ending before."""
    values = settings(tmp_path, tiny_student, "logit_kd", workers=1, steps=60, checkpoint_every_steps=5)
    slow = {"kind": "simulated", "tokens_per_second": 2000}
    shared = write(tmp_path / "shared.yaml", {"teachers": teachers(tiny_teacher, "shared")})
    values["teachers"] = [*teachers(tiny_teacher, "own", engine=slow), {"name": "shared", "attach": True}]
    job = tmp_path / "job"
    job.mkdir()
    config = write(job / "run.yaml", values)
    served = run_rayk("serve", shared, "--detach", RAY_ADDRESS=head.address)
    assert served.returncode == 0, served.stdout + served.stderr

    submit(head, job, "run", "run.yaml", wait=False, RAYK_ORPHAN_SECONDS="4")
    wait_until(lambda: len(metrics(tmp_path / "run")) >= 10, "step 10")
    assert actor_processes("ServeReplica:own-")
    stop = [sys.executable, "-m", "ray.scripts.scripts", "job", "stop", f"--address={head.dashboard}", "stopped"]
    assert subprocess.run(stop, env=environment(), timeout=PATIENCE_SECONDS, check=False).returncode == 0
    wait_until(lambda: not actor_processes("ServeReplica:own-"), "the end of the job's teacher")
    reached = CheckpointStore(f"{tmp_path / 'run'}/checkpoints").steps()[-1]
    assert 5 <= reached < 60
    assert actor_processes("ServeReplica:shared:")

    done = run_rayk("run", config, "--resume", RAY_ADDRESS=head.address)
    assert done.returncode == 0, done.stderr
    assert f"resumed at step {reached}" in " ".join(done.stderr.split())
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(1, 61))
    removed = run_rayk("serve", shared, "--remove", RAY_ADDRESS=head.address)
    assert removed.returncode == 0, removed.stderr
    wait_until(lambda: not actor_processes("ServeReplica:shared:"), "the end of the detached teacher")


@pytest.mark.nightly
def test_driver_killed_while_its_teachers_load_is_resumed(head, tmp_path, tiny_student, tiny_teacher):
    values = settings(tmp_path, tiny_student, "logit_kd", workers=1, steps=3)
    slow = {"kind": "simulated", "start_seconds": 8, "tokens_per_second": 1e6}
    values["teachers"] = teachers(tiny_teacher, "slow", engine=slow, replicas=2)
    config = write(tmp_path / "run.yaml", values)
    with rayk("run", config, log=tmp_path / "log", RAY_ADDRESS=head.address) as process:
        wait_until(lambda: actor_processes("ServeReplica:slow-"), "the teacher's replicas", process)
        second = run_rayk("run", config, "--resume", RAY_ADDRESS=head.address)
        assert second.returncode == 2
        assert f"belongs to process {process.pid} on " in " ".join(second.stderr.split())
        os.killpg(process.pid, signal.SIGKILL)
    assert not metrics(tmp_path / "run")
    done = run_rayk("run", config, "--resume", RAY_ADDRESS=head.address)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3]
    wait_until(lambda: not actor_processes("ServeReplica:slow-"), "the end of its teacher")


def test_served_teacher_runs_until_it_is_interrupted(head, tmp_path, tiny_student, tiny_teacher):
    values = settings(tmp_path, tiny_student, "logit_kd")
    values["teachers"] = [{"name": "shared", "model": tiny_teacher, "resources": {"num_cpus": 0.5}}]
    client = write(tmp_path / "client.yaml", values | {"teachers": [{"name": "shared", "attach": True}]})
    config = write(tmp_path / "serve.yaml", values)
    with rayk("serve", config, log=tmp_path / "log", RAY_ADDRESS=head.address) as process:
        wait_until(lambda: "Ctrl-C removes the teachers." in (tmp_path / "log").read_text(), "the teacher", process)
        attached = run_rayk("run", client, RAY_ADDRESS=head.address)
        assert attached.returncode == 0, attached.stderr
        process.send_signal(signal.SIGINT)
        wait_until(lambda: process.poll() is not None, "the end of `rayk serve`")
    lines = (tmp_path / "log").read_text().splitlines()
    assert process.returncode == 0, lines
    assert lines[1].startswith("Teacher shared is ready: vocabulary ")
    (printed,) = [line.removeprefix("  export RAY_ADDRESS=") for line in lines if "RAY_ADDRESS=" in line]
    assert printed.rpartition(":")[2] == head.address.rpartition(":")[2]  # the node's own address instead of 127.0.0.1
    assert len(lines) == 10, lines
    gone = run_rayk("doctor", client, RAY_ADDRESS=printed)
    assert gone.returncode == 2
    assert "No teacher 'shared' answers on this Ray cluster" in gone.stdout


def test_served_teacher_is_removed_at_sigterm(head, tmp_path, tiny_student, tiny_teacher):
    values = settings(tmp_path, tiny_student, "logit_kd")
    values["teachers"] = [{"name": "shared", "model": tiny_teacher, "resources": {"num_cpus": 0.5}}]
    config = write(tmp_path / "serve.yaml", values)
    with rayk("serve", config, log=tmp_path / "log", RAY_ADDRESS=head.address) as process:
        wait_until(lambda: "Ctrl-C removes the teachers." in (tmp_path / "log").read_text(), "the teacher", process)
        assert actor_processes("ServeReplica:shared:")
        process.terminate()
        wait_until(lambda: process.poll() is not None, "the end of `rayk serve`")
    assert process.returncode == 0, (tmp_path / "log").read_text()
    wait_until(lambda: not actor_processes("ServeReplica:shared:"), "the end of the teacher's replica")
