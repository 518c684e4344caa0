"""A few rollouts of a run are kept in rollouts.jsonl, each once however often the run is resumed."""

import json

import pytest

from rayk.config import parse_config
from rayk.report.run_directory import read_lines
from rayk.run import distill
from rayk.training.rollout_samples import RolloutSamples
from tests.runs import settings


@pytest.mark.cluster
def test_a_run_keeps_rollouts_of_some_steps(tmp_path, tiny_student, served):
    method = {"kind": "on_policy", "support": {"kind": "topk", "k": 16}}
    result = distill(parse_config(settings(tmp_path, tiny_student, method, steps=5)))
    rows = read_lines(result.output / "rollouts.jsonl")
    assert [row["step"] for row in rows] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        number = int(row["where"].rsplit(" ", 1)[1])
        assert row["prompt"].endswith(prompts[number - 1])
        assert 0 < row["tokens"] <= 12 and row["finish_reason"] in ("stop", "length")
    assert "Sample rollouts" in (result.output / "report.html").read_text()


def test_steps_after_the_checkpoint_are_removed(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 20, 40)) + '{"step": 6')
    RolloutSamples(tmp_path, 30, 200, None).record(33, [])
    assert [row["step"] for row in read_lines(path)] == [1, 20]
