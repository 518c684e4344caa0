"""`rayk serve` on a machine without a cluster: other processes connect with the lines that it prints."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests.clusters import free_ports
from tests.runs import PATIENCE_SECONDS, environment, rayk, wait_until

pytestmark = pytest.mark.cluster

CONNECT = """
import sys
import rayk
teacher = rayk.connect_teacher(sys.argv[1])
print("generated", len(teacher.generate(["the cat"], max_new_tokens=2)))
"""


def connect(name, **variables):
    return subprocess.run(
        [sys.executable, "-c", CONNECT, name], capture_output=True, text=True, env=environment() | variables,
        timeout=PATIENCE_SECONDS, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("auth", [pytest.param("disabled", marks=pytest.mark.nightly), "token"])
def test_printed_lines_connect_another_process(auth, tmp_path, tiny_teacher):
    """With Ray's token authentication, too, which a local cluster enables unless it is told otherwise."""
    config = tmp_path / "teachers.yaml"
    config.write_text(
        yaml.safe_dump({"teachers": [{"name": "shared", "model": tiny_teacher, "resources": {"num_cpus": 0.5}}]})
    )
    own = {"RAY_AUTH_MODE": auth, "HOME": str(tmp_path)}
    log = tmp_path / "log"
    with rayk("serve", config, log=log, **own) as process:
        wait_until(lambda: "Ctrl-C removes the teachers." in log.read_text(), "the teacher", process)
        exports = dict(re.findall(r"^  export (\w+)=(\S+)$", log.read_text(), re.MULTILINE))
        assert exports.keys() == {"RAY_ADDRESS", "RAY_AUTH_MODE"}
        assert "rayk.connect_teacher('shared')" in log.read_text()
        connected = connect("shared", HOME=str(tmp_path), **exports)
        assert connected.stdout == "generated 1\n", connected.stderr
        process.send_signal(signal.SIGINT)
        wait_until(lambda: process.poll() is not None, "the end of `rayk serve`")
    assert process.returncode == 0


def test_missing_teacher_is_one_sentence(tmp_path):
    failed = connect("nobody", HOME=str(tmp_path))
    assert "InputError: No teacher 'nobody' answers on this Ray cluster; start it with `rayk serve`" in failed.stderr


def test_dead_address_is_one_sentence_within_seconds(tmp_path, tiny_student):
    [port] = free_ports(1)
    began = time.monotonic()
    failed = connect("shared", RAY_ADDRESS=f"127.0.0.1:{port}")
    assert f"InputError: No Ray cluster answers at RAY_ADDRESS '127.0.0.1:{port}' within 10 s" in failed.stderr
    assert time.monotonic() - began < 60
    assert "RAY_ADDRESS" not in os.environ
