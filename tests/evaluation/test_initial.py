"""The student is measured once before its first update, which changes nothing that is learned."""

import json

import pytest

from rayk.config import parse_config
from rayk.run import distill
from tests.runs import curve, settings, weights, write_rows


@pytest.fixture
def values(tmp_path, tiny_student):
    """make(name, **evaluation): the settings of a supervised run in tmp_path/name."""

    def make(name, **evaluation):
        values = settings(tmp_path, tiny_student, {"kind": "supervised"}, steps=3, checkpoint_every_steps=1)
        values["data"]["evaluation"] = {"path": str(write_rows(tmp_path / "held_out.jsonl", count=5))}
        generation = {"max_new_tokens": 4, "temperature": 1.0}
        values["evaluation"] = {"generation": generation, "answer_field": "answer"} | evaluation
        return values | {"teachers": [], "output": str(tmp_path / name)}

    return make


@pytest.mark.slow
def test_untrained_student_is_measured_without_changing_the_run(values, tmp_path):
    measured, plain = (
        distill(parse_config(values(name, before_training=given))).summary
        for name, given in (("measured", True), ("plain", False))
    )
    before = measured["student_before"]
    assert set(before) == set(measured["student"]) >= {"loss", "accuracy", "stopped"}
    assert before["loss"] > measured["student"]["loss"]
    assert plain["student_before"] == {} and not (tmp_path / "plain" / "student_before.json").exists()
    texts = json.loads((tmp_path / "measured" / "answers_before.json").read_text())
    assert all(sample["before"] == texts[sample["where"]] for sample in measured["samples"])
    assert [sample["before"] for sample in plain["samples"]] == [None] * 5
    assert curve(tmp_path / "measured") == curve(tmp_path / "plain")
    assert measured["student"] == plain["student"]
    one, other = weights(tmp_path / "measured"), weights(tmp_path / "plain")
    assert all((one[name] == other[name]).all() for name in one)


@pytest.mark.slow
def test_initial_metrics_are_kept_on_resume(values, tmp_path):
    config = parse_config(values("run"))
    expected = distill(config).summary["student_before"]
    path = tmp_path / "run" / "student_before.json"
    assert json.loads(path.read_text()) == expected
    path.write_text(json.dumps({"loss": 7.0}))
    assert distill(config, resume=True).summary["student_before"] == {"loss": 7.0}
    path.unlink()
    assert distill(config, resume=True).summary["student_before"] == {}
