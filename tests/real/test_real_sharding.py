"""SmolLM2 trained by Ray Train on two sharded workers, killed, and resumed with one worker and with two."""

import os
import shutil
import signal
from uuid import uuid4

import pytest
import yaml

from rayk.config import parse_config
from rayk.run import distill
from tests.runs import assert_same_learning, metrics, processes, rayk, run_rayk, settings, wait_until

pytestmark = pytest.mark.cluster

STEPS, KILLED_AFTER = 4, 2


def values_of(folder, model, **training):
    values = settings(
        folder, model, steps=STEPS, batch_size=4, learning_rate=1e-4, checkpoint_every_steps=2, threads=1, **training
    )
    values["data"] |= {"chat_template": True, "max_tokens": 96, "too_long": "truncate"}
    return values


def write(path, values):
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.nightly
def test_a_sharded_run_is_killed_and_resumed_with_one_and_two_workers(tmp_path, smollm2):
    alone = parse_config(values_of(tmp_path, smollm2) | {"output": str(tmp_path / "alone")})
    distill(alone)
    sharded = values_of(tmp_path, smollm2, workers=2, sharding="fsdp") | {"output": str(tmp_path / "two")}
    config = write(tmp_path / "two.yaml", sharded)
    checkpoint = tmp_path / "two" / "checkpoints" / f"step-{KILLED_AFTER:08d}"
    mark = {"RAYK_TEST_MARK": uuid4().hex}
    with rayk("run", config, log=tmp_path / "killed.log", **mark) as process:
        wait_until(lambda: list(checkpoint.glob("*.manifest.json")), "a checkpoint", process, seconds=400)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    wait_until(lambda: not processes(**mark), "the end of its workers")
    assert KILLED_AFTER <= metrics(tmp_path / "two")[-1]["step"] < STEPS
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    one = values_of(tmp_path, smollm2, workers=1) | {"output": str(tmp_path / "one")}
    for name, path in {"one": write(tmp_path / "one.yaml", one), "two": config}.items():
        done = run_rayk("run", path, "--resume")
        assert done.returncode == 0, done.stderr
        assert "resumed at step" in done.stderr
        assert_same_learning(tmp_path / name, tmp_path / "alone")
