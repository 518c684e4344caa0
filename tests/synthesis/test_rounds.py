"""Each round of a run begins with the previous round's student, wherever the run was killed."""

import json
import os
import signal
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import ray
import yaml
from ray import serve

from rayk.commands.doctor import examine
from rayk.config import parse_config
from rayk.errors import InputError
from rayk.models import weights_fingerprint
from rayk.report.report import write_report
from rayk.run import ProgressListener, distill, synthesize
from tests.engines.endpoint import Reply
from tests.runs import assert_same_learning, environment, metrics, rayk, settings, wait_until

pytestmark = pytest.mark.cluster

PROMPTS = [f"{n} + {n} =" for n in range(24)]


def run_of(folder, student, **training):
    folder.mkdir(exist_ok=True)
    values = settings(folder, student, "preference", **training)
    rows = folder / "questions.jsonl"
    rows.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": p, "chosen": f"[{p}]", "rejected": " no"}) + "\n" for p in PROMPTS))
    return values | {
        "teachers": [{"name": "parrot", "attach": True}], "rounds": 2,
        "data": {"train": {"path": str(rows)}, "evaluation": {"path": str(pairs)}},
        "synthesis": {
            "kind": "preferences", "sampling": {"max_new_tokens": 8, "temperature": 1.0}, "filters": [],
            "in_flight": 4, "student": {"resources": {"num_cpus": 0.25}},
        },
    }  # fmt: skip


DYING = """
import os, signal, sys
from rayk.run import rounds

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

class Dying(rounds.ProgressListener):
    def stage(self, text):
        if text == sys.argv[2]:
            die()

rounds.write_json = die  # called with the results of all rounds
rounds.distill(sys.argv[1], resume=True, listener=Dying())
"""
"""A run that kills itself at the beginning of a stage, or after the last round."""


def rows_of(run):
    rows = pq.read_table(run / "synthesis" / "rows.parquet").to_pylist()
    return [row | {"where": None} for row in rows]


def completions(run):
    parts = sorted((run / "synthesis" / "completions").glob("part-*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


class Stages(ProgressListener):
    def __init__(self):
        self.up = []

    def stage(self, text):
        if text.startswith(("Training", "Synthesizing")):
            self.up.append(len([name for name in serve.status().applications if "-student-" in name]))


@pytest.mark.nightly
def test_rounds_are_equal_however_often_they_are_killed(tmp_path, tiny_student, chat_teacher, endpoint):
    training = {"steps": 30, "checkpoint_every_steps": 4}
    watching = Stages()
    whole = distill(parse_config(run_of(tmp_path / "whole", tiny_student, **training)), listener=watching)
    assert watching.up == [1, 0, 1, 0]
    assert [each.prompt for each in endpoint.requests].count(PROMPTS[0]) == 1  # requested by the first round only
    _check_rounds(whole, tiny_student)

    endpoint.reset()
    values = run_of(tmp_path / "cut", tiny_student, **training)
    path, out, log = tmp_path / "run.yaml", tmp_path / "cut" / "run", tmp_path / "log"
    path.write_text(yaml.safe_dump(values))
    for prompt in PROMPTS:
        endpoint.replies[prompt] = [Reply(delay_seconds=0.3)]
    address = ray.get_runtime_context().gcs_address
    first, second = out / "rounds" / "01", out / "rounds" / "02"

    def killed_when(condition, what):
        with rayk("run", path, "--resume", log=log, RAY_ADDRESS=address) as process:
            wait_until(condition, what, process)
            os.killpg(process.pid, signal.SIGKILL)

    def killed_at(stage):
        command = [sys.executable, "-c", DYING, str(path), stage]
        died = subprocess.run(
            command, env=environment(RAY_ADDRESS=address), capture_output=True, text=True, timeout=240, check=False
        )
        assert died.returncode == -signal.SIGKILL, died.stderr

    killed_when(lambda: len(completions(first)) > 8, "some completions")
    kept = {row["prompt"] for row in completions(first) if row["teacher"] != "student"}
    before = len(endpoint.requests)
    assert 0 < len(kept) < 24
    killed_at("Round 2 of 2")
    asked = len(endpoint.requests)
    assert (first / "summary.json").exists() and not second.exists()
    killed_when(lambda: len(metrics(second)) > 8, "steps of the second round")
    assert len(endpoint.requests) == asked
    assert not kept & {each.prompt for each in endpoint.requests[before:]}
    with pytest.raises(InputError, match="already contains a run, which was started before; continue it with"):
        distill(parse_config(values))
    write_report([out], tmp_path / "report.html")
    assert "unfinished" in (tmp_path / "report.html").read_text()
    killed_at("after the last round")
    assert (second / "summary.json").exists() and not (out / "summary.json").exists()
    cut = distill(parse_config(values), resume=True)
    assert len(endpoint.requests) == asked
    for number in ("01", "02"):
        assert rows_of(out / "rounds" / number) == rows_of(whole.output / "rounds" / number)
        assert_same_learning(out / "rounds" / number, whole.output / "rounds" / number)
    assert_same_learning(cut.output, whole.output)


def _check_rounds(result, student):
    """The second round trains on completions of the first round's model and gives the run's result."""
    first, second = (result.output / "rounds" / number for number in ("01", "02"))
    by_student = [[row for row in completions(run) if row["teacher"] == "student"] for run in (first, second)]
    assert {row["weights"] for row in by_student[0]} == {weights_fingerprint(student)}
    assert {row["weights"] for row in by_student[1]} == {weights_fingerprint(str(first / "model"))}
    assert [row["text"] for row in by_student[0]] != [row["text"] for row in by_student[1]]
    assert [row["chosen"] for row in rows_of(first)] == [f"[{prompt}]" for prompt in PROMPTS]
    # The reference model of a round is its initial student.
    assert metrics(first)[0]["reward_margin"] == pytest.approx(0, abs=1e-6)
    assert metrics(second)[0]["reward_margin"] == pytest.approx(0, abs=1e-6)
    assert weights_fingerprint(str(result.model)) == weights_fingerprint(str(second / "model"))
    assert [each["name"] for each in result.summary["rounds"]] == ["run-round-1", "run-round-2"]
    assert result.summary["student"] == result.summary["rounds"][1]["student"]
    assert [(row["step"], row["round"]) for row in metrics(result.output)][29:31] == [(30, 1), (31, 2)]
    page = (result.output / "report.html").read_text()
    assert "run-round-1" in page
    assert "pairs whose chosen answer is the longer one" in page
    assert "the rejected completion of the pair" in page


@pytest.mark.long
def test_resume_refuses_changed_rounds(tmp_path, tiny_student, chat_teacher, endpoint):
    values = run_of(tmp_path, tiny_student, steps=1)
    out = tmp_path / "run"
    assert synthesize(parse_config(values))["kept"] == 24
    assert (out / "rounds" / "01" / "synthesis" / "rows.parquet").exists()
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    assert f"rounds: round 1 of 2 is next, in {out}/rounds/01." in [each.text for each in examine(str(path))]
    distill(parse_config(values | {"rounds": 2}))
    assert len(endpoint.requests) == 24
    with pytest.raises(InputError, match="was started with 'rounds'; resume it the same way"):
        distill(parse_config(values | {"rounds": 1}), resume=True)
    with pytest.raises(InputError, match=r"/rounds/01' was started with another 'method\.beta'"):
        distill(parse_config(values | {"method": {"kind": "preference", "beta": 0.7}}), resume=True)
    longer = distill(parse_config(values | {"rounds": 3}), resume=True)
    assert len(longer.summary["rounds"]) == 3
    with pytest.raises(InputError, match="has already started round 3; raise rounds"):
        distill(parse_config(values), resume=True)
