"""Full and read-only disks: real ones, small file systems in a mount namespace of a process of its own."""

import json
import subprocess
import sys

import pytest

from rayk.config import parse_config
from rayk.run import distill
from tests.runs import PATIENCE_SECONDS, assert_same_learning, environment, settings

pytestmark = pytest.mark.slow

IN_NAMESPACE = ("unshare", "--map-root-user", "--mount")
"""Start of a command that may mount file systems which only it and its children see."""
NOTHING_SHARED = subprocess.run([*IN_NAMESPACE, "true"], capture_output=True, check=False).returncode != 0

PROGRAM = """
import json, subprocess, sys, time
from pathlib import Path

from rayk.config import parse_config
from rayk.errors import RaykError
from rayk.run import ProgressListener, distill
from tests.integration.test_deaths import Striking

values, small, other = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
ballast = small / "ballast"

def mount(*arguments):
    while subprocess.run(["mount", *arguments]).returncode:  # a file is open just now
        time.sleep(0.01)

def fill():
    with ballast.open("ab", buffering=0) as file:
        try:
            while file.write(bytes(1 << 12)):
                pass
        except OSError:
            pass

def attempt(name, listener=None, **changes):
    training = values["training"] | changes
    try:
        distill(parse_config(values | {"training": training}), resume=True, listener=listener)
        print(name, "| done", flush=True)
    except RaykError as error:
        print(name, "|", type(error).__name__, "|", error, flush=True)

for folder in (small, other):
    mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder))

listener = Striking(12, fill)
attempt("full during training", listener)
assert listener.struck.is_set()
fill()
attempt("still full")
ballast.unlink()
mount("-o", "remount,ro", str(small))
attempt("read-only")
mount("-o", "remount,rw", str(small))
attempt("free again")

values["output"] = str(small / "second")
checkpoints = {"checkpoints": str(other / "checkpoints")}
listener = Striking(12, lambda: mount("-o", "remount,ro", str(other)))
attempt("read-only checkpoints", listener, **checkpoints)
mount("-o", "remount,rw", str(other))
attempt("writable again", **checkpoints)
subprocess.run(["cp", "-r", str(small), sys.argv[4]], check=True)
"""


@pytest.mark.skipif(NOTHING_SHARED, reason="this user may not mount file systems in a namespace")
def test_a_run_survives_full_and_read_only_disks(tmp_path, tiny_student):
    """Each attempt ends with one sentence, and the run goes on once the disk can be written again."""
    training = {"steps": 400, "checkpoint_every_steps": 5, "keep_checkpoints": 1, "learning_rate": 1e-3}
    values = settings(tmp_path, tiny_student, **training)
    distill(parse_config(values))
    for name in ("small", "other"):
        (tmp_path / name).mkdir()
    disturbed = values | {"output": str(tmp_path / "small" / "first")}
    command = [*IN_NAMESPACE, sys.executable, "-c", PROGRAM, json.dumps(disturbed)]
    done = subprocess.run(
        [*command, *(str(tmp_path / name) for name in ("small", "other", "kept"))], capture_output=True, text=True,
        env=environment(), timeout=PATIENCE_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    said = dict(line.split(" | ", 1) for line in done.stdout.splitlines() if " | " in line)
    assert "RunFailed" in said["full during training"], said
    assert "No space left on device" in said["full during training"]
    assert said["still full"].startswith("RunFailed | There is no space left in '"), said
    assert said["read-only"].startswith("InputError | '"), said
    assert "Read-only file system" in said["read-only"], said
    assert "could not be written" in said["read-only checkpoints"] and "Read-only file" in said["read-only checkpoints"]
    assert said["free again"] == said["writable again"] == "done"
    assert_same_learning(tmp_path / "run", tmp_path / "kept" / "first", 1e-6)
    assert_same_learning(tmp_path / "run", tmp_path / "kept" / "second", 1e-6)
