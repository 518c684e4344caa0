"""The first Ctrl-C or SIGTERM ends the current step and saves it; the resumed run equals one that was not stopped."""

import re
import signal

import pytest
import yaml

from rayk.config import parse_config
from rayk.run import distill
from rayk.training.checkpoint import CheckpointStore
from tests.runs import assert_same_learning, metrics, rayk, settings, wait_until

pytestmark = pytest.mark.cluster


@pytest.mark.long
@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGINT, 2)])
def test_interrupted_run_saves_its_last_step(tmp_path, tiny_student, number, workers):
    """No checkpoint is due before the last step, so without the interruption's own nothing would be there."""
    values = settings(tmp_path, tiny_student, workers=workers, steps=100_000, threads=1, schedule="constant")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    log = tmp_path / "log"
    with rayk("run", tmp_path / "run.yaml", log=log) as process:
        wait_until(lambda: len(metrics(tmp_path / "run")) >= 5, "step 5", process)
        process.send_signal(number)
        wait_until(lambda: process.poll() is not None, "the end of the run")
    lines = log.read_text().splitlines()
    assert process.returncode == 130, lines
    [step] = CheckpointStore(str(tmp_path / "run" / "checkpoints")).steps()
    assert step == metrics(tmp_path / "run")[-1]["step"] >= 5
    said = re.fullmatch(r"rayk: Interrupted; the run is checkpointed at step ([\d,]+)\. .*--resume.*", lines[-1])
    assert said and int(said[1].replace(",", "")) == step, lines
    assert "Stopping after the current step with a checkpoint; interrupt again to stop at once." in lines
    assert not (tmp_path / "run" / "stop-requested").exists()
    if not workers and number == signal.SIGINT:
        _assert_resumes(tmp_path, values, step)


def _assert_resumes(folder, values, step):
    """A run that was interrupted at `step` and goes on to `step` + 3 equals one that was not."""
    for name in ("whole", "run"):
        changed = values | {"output": str(folder / name)}
        changed["training"] = values["training"] | {"steps": step + 3}
        if name == "run":
            path = folder / "run" / "config.yaml"
            stored = yaml.safe_load(path.read_text())
            stored["training"] |= {"steps": step + 3}
            path.write_text(yaml.safe_dump(stored))
        distill(parse_config(changed), resume=name == "run")
    assert_same_learning(folder / "whole", folder / "run", 1e-4)
