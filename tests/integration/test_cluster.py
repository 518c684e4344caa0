"""A cluster that another process has started: submitted jobs, and served teachers that other processes use."""

import signal
import socket
import subprocess
import sys
import tempfile
from uuid import uuid4

import pytest
import yaml
from transformers import AutoModelForCausalLM

from tests.runs import (
    PATIENCE_SECONDS,
    actor_processes,
    environment,
    metrics,
    processes,
    rayk,
    run_rayk,
    settings,
    wait_until,
)

pytestmark = pytest.mark.cluster


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


@pytest.fixture(scope="module")
def head():
    """(Ray address, dashboard address) of `ray start --head`, a separate cluster."""
    mark = {"RAYK_TEST_MARK": uuid4().hex}
    port, dashboard, agent, client = free_ports(4)
    # Ray's sockets are in its temporary folder, and their paths are limited to about 100 characters.
    with tempfile.TemporaryDirectory(prefix="rayk", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats",
            f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
            f"--ray-client-server-port={client}", "--num-cpus=8", f"--object-store-memory={200 << 20}",
            "--node-ip-address=127.0.0.1", f"--temp-dir={folder}",
        ]  # fmt: skip
        with open(f"{folder}/head.log", "wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment(**mark), start_new_session=True)
        try:
            wait_until(lambda: _answers(dashboard), "the dashboard", process)
            yield f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
        finally:
            process.terminate()
            for left in processes(**mark):
                left.kill()
            process.wait()


def _answers(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def write(path, values):
    path.write_text(yaml.safe_dump(values))
    return path


def test_submitted_job_completes(head, tmp_path, tiny_student, tiny_teacher):
    values = settings(tmp_path, tiny_student, "logit_kd", workers=1, steps=4)
    values["teachers"] = [{"name": "own", "model": tiny_teacher, "resources": {"num_cpus": 0.5}}]
    job = tmp_path / "job"
    job.mkdir()
    write(job / "run.yaml", values)
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "job", "submit", f"--address={head[1]}", f"--working-dir={job}",
        "--", sys.executable, "-m", "rayk.cli", "run", "run.yaml",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=2 * PATIENCE_SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout + done.stderr
    run = tmp_path / "run"
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4]
    for name in ("config.yaml", "summary.json", "report.html"):
        assert (run / name).is_file()
    AutoModelForCausalLM.from_pretrained(run / "model")


def test_served_teacher_runs_until_it_is_interrupted(head, tmp_path, tiny_student, tiny_teacher):
    values = settings(tmp_path, tiny_student, "logit_kd")
    values["teachers"] = [{"name": "shared", "model": tiny_teacher, "resources": {"num_cpus": 0.5}}]
    client = write(tmp_path / "client.yaml", values | {"teachers": [{"name": "shared", "attach": True}]})
    with rayk("serve", write(tmp_path / "serve.yaml", values), log=tmp_path / "log", RAY_ADDRESS=head[0]) as process:
        wait_until(lambda: "Ctrl-C removes the teachers." in (tmp_path / "log").read_text(), "the teacher", process)
        attached = run_rayk("run", client, RAY_ADDRESS=head[0])
        assert attached.returncode == 0, attached.stderr
        process.send_signal(signal.SIGINT)
        wait_until(lambda: process.poll() is not None, "the end of `rayk serve`")
    lines = (tmp_path / "log").read_text().splitlines()
    assert process.returncode == 0, lines
    assert lines[1].startswith("Teacher shared is ready: vocabulary ")
    (printed,) = [line.removeprefix("  export RAY_ADDRESS=") for line in lines if "RAY_ADDRESS=" in line]
    assert printed.rpartition(":")[2] == head[0].rpartition(":")[2]  # the node's own address instead of 127.0.0.1
    assert len(lines) == 10, lines
    gone = run_rayk("doctor", client, RAY_ADDRESS=printed)
    assert gone.returncode == 2
    assert "No teacher 'shared' answers on this Ray cluster" in gone.stdout


def test_served_teacher_is_removed_at_sigterm(head, tmp_path, tiny_student, tiny_teacher):
    values = settings(tmp_path, tiny_student, "logit_kd")
    values["teachers"] = [{"name": "shared", "model": tiny_teacher, "resources": {"num_cpus": 0.5}}]
    with rayk("serve", write(tmp_path / "serve.yaml", values), log=tmp_path / "log", RAY_ADDRESS=head[0]) as process:
        wait_until(lambda: "Ctrl-C removes the teachers." in (tmp_path / "log").read_text(), "the teacher", process)
        assert actor_processes("ServeReplica:shared:")
        process.terminate()
        wait_until(lambda: process.poll() is not None, "the end of `rayk serve`")
    assert process.returncode == 0, (tmp_path / "log").read_text()
    wait_until(lambda: not actor_processes("ServeReplica:shared:"), "the end of the teacher's replica")
