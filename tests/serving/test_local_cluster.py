"""The start of a local Ray cluster on a machine that is too busy for it."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.long

# A raylet that ends at once is what a busy machine has after 15 s, when the raylet gives up on its agent.
PROGRAM = """
import os, pathlib, sys
import ray._private.services as services
from rayk.serving import cluster

start_raylet = services.start_raylet
starts = []

def start_raylet_that_ends(*args, **kwargs):
    info = start_raylet(*args, **kwargs)
    starts.append(info)
    if len(starts) <= int(sys.argv[1]):
        info.process.kill()
    return info

services.start_raylet = start_raylet_that_ends
cluster.start_ray()
import ray
print("nodes:", len(ray.nodes()), "starts:", len(starts))
"""


@pytest.fixture(scope="module")
def outputs() -> dict[int, tuple[str, str]]:
    """Standard output and error of the program by the number of raylets that end. Each waits 30 s for a dead node, so
    the programs run at the same time."""
    programs = {
        failures: subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(failures)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for failures in (1, 2)
    }
    return {failures: program.communicate(timeout=300) for failures, program in programs.items()}


@pytest.mark.cluster
def test_local_cluster_is_started_again_when_its_node_dies(outputs):
    assert "nodes: 1 starts: 2" in outputs[1][0], outputs[1][1][-2000:]


@pytest.mark.cluster
def test_cluster_that_never_starts_is_one_sentence(outputs):
    assert "RunFailed: Ray did not start on this machine in 2 attempts" in outputs[2][1]


LISTENING = """
import psutil
from rayk.serving import cluster

cluster.start_ray()
here = psutil.Process()
sockets = [socket for process in [here, *here.children(recursive=True)] for socket in process.net_connections("inet")]
print("listening:", *sorted({socket.laddr.ip for socket in sockets if socket.status == "LISTEN"}))
"""


@pytest.mark.cluster
@pytest.mark.long
def test_local_cluster_listens_on_this_machine_only_and_keeps_its_token_to_the_user(tmp_path):
    variables = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"} | {"HOME": str(tmp_path)}
    program = subprocess.run(
        [sys.executable, "-c", LISTENING], env=variables, capture_output=True, text=True, timeout=300, check=False
    )
    assert program.returncode == 0, program.stderr[-2000:]
    addresses = program.stdout.partition("listening: ")[2].split()
    assert addresses and {address.removeprefix("::ffff:") for address in addresses} <= {"127.0.0.1", "::1"}
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
