"""A run directory is complete, can be used without rayk, and is resumed only with the same settings and rows."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayk.config import load_config, parse_config
from rayk.errors import InputError
from rayk.run import ProgressListener, distill
from rayk.run.directory import PLACEMENT, SELECTION, check_directory, claim_directory, claim_training_rows
from tests.checkpoints import saved_weights
from tests.runs import settings, write_rows
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_the_saved_student_has_the_trained_weights(tmp_path, tie):
    tiny_model(tmp_path / "student", hidden=16, layers=1, tie=tie, tokenizer=tiny_tokenizer())
    result = distill(parse_config(settings(tmp_path, str(tmp_path / "student"))))
    model = AutoModelForCausalLM.from_pretrained(result.model)
    trained = saved_weights(str(result.output / "checkpoints"))
    copy = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    before = copy.state_dict()["model.embed_tokens.weight"].clone()
    copy.load_state_dict({name.removeprefix("student.model."): value for name, value in trained.items()}, strict=False)
    tokenizer = AutoTokenizer.from_pretrained(result.model)
    ids = tokenizer("the cat sat on 12 + 34", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, copy(ids).logits)
    assert not torch.equal(before, model.state_dict()["model.embed_tokens.weight"])
    assert not (result.output / "model.unfinished").exists()


def test_a_run_directory_has_all_files(tmp_path, tiny_student, served):
    class StepListener(ProgressListener):
        def __init__(self):
            self.seen = []

        def steps(self, rows, total):
            self.seen.extend(rows)

    write_rows(tmp_path / "held_out.jsonl", count=5, seed=9)
    values = settings(tmp_path, tiny_student, "logit_kd", steps=4) | {
        "tracking": {"tensorboard": True},
        "evaluation": {"every_steps": 2, "generation": {"max_new_tokens": 4}, "answer_field": "answer", "samples": 3},
    }
    values["data"]["evaluation"] = {"path": str(tmp_path / "held_out.jsonl")}
    listener = StepListener()
    result = distill(parse_config(values), listener=listener)

    assert load_config(result.output / "config.yaml") == load_config(
        result.output / "config.yaml", output=str(result.output)
    )
    assert load_config(result.output / "config.yaml").training.steps == 4
    rows = [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]
    assert rows == listener.seen
    for row in rows:
        assert row.keys() >= {
            "step", "epoch", "loss", "cross_entropy", "forward_kl", "learning_rate", "gradient_norm", "tokens",
            "counted_tokens", "tokens_per_second", "teacher_wait_seconds", "step_seconds",
        }  # fmt: skip
        assert ("evaluation_forward_kl" in row) == (row["step"] % 2 == 0)
    summary = json.loads((result.output / "summary.json").read_text())
    assert summary == result.summary
    assert (summary["method"], summary["steps"], summary["rows"]["evaluation"]) == ("logit_kd", 4, 5)
    assert summary["student"].keys() >= {"loss", "forward_kl", "reverse_kl", "agreement", "accuracy", "stopped"}
    assert summary["student"]["forward_kl"] == rows[-1]["evaluation_forward_kl"]
    assert summary["teacher"].keys() >= {"loss", "accuracy"}
    assert len(summary["samples"]) == 3
    assert all(sample["teacher"] is not None for sample in summary["samples"])
    assert "<html" in (result.output / "report.html").read_text()
    assert list((result.output / "tensorboard").glob("events.*"))


def started(tmp_path, **changes):
    values = settings(tmp_path, "student", "logit_kd") | {"teachers": [{"name": "big", "model": "m"}]}
    return parse_config(values | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"workers": 2, "resources": {"num_cpus": 3}, "prefetch": 9, "steps": 5}},
        {"teachers": [{"name": "big", "model": "m", "replicas": 3, "engine": {"batch_tokens": 7, "device": "cpu"}}]},
        {"evaluation": {"every_steps": 3}, "name": "other"},
    ],
    ids=["training", "teachers", "evaluation"],
)
def test_a_run_is_resumed_on_other_machines(tmp_path, changes):
    config = started(tmp_path, training={"workers": 0, "steps": 5})
    claim_directory(config, resume=False)
    claim_training_rows(config, "rows")
    check_directory(started(tmp_path, **{"training": {"workers": 0, "steps": 5}} | changes), resume=True)


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"seed": 5}, "seed"),
        ({"training": {"workers": 0, "steps": 5, "batch_size": 3}}, "training.batch_size"),
        ({"teachers": [{"name": "big", "model": "m", "engine": {"dtype": "bfloat16"}}]}, "teachers.engine.dtype"),
        ({"method": {"kind": "logit_kd", "support": {"kind": "topk", "k": 3}}}, "method.support.k"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(tmp_path, changes, place):
    config = started(tmp_path, training={"workers": 0, "steps": 5})
    claim_directory(config, resume=False)
    other = started(tmp_path, **{"training": {"workers": 0, "steps": 5}} | changes)
    check_directory(other, resume=True)  # nothing has been trained yet
    claim_training_rows(config, "rows")
    with pytest.raises(InputError, match=f"was started with another '{place}'"):
        check_directory(other, resume=True)
    with pytest.raises(InputError, match="already contains a run"):
        check_directory(config, resume=False)


def test_a_run_is_not_resumed_with_other_rows(tmp_path):
    config = started(tmp_path)
    claim_directory(config, resume=False)
    claim_training_rows(config, "rows")
    claim_training_rows(config, "rows")
    with pytest.raises(InputError, match=r"The rows of data\.train .* are not those that the run"):
        claim_training_rows(config, "other rows")


def test_settings_that_may_change_are_kept_apart_from_those_that_select_rows():
    assert not PLACEMENT & SELECTION
    assert "judges" in SELECTION


def test_output_in_the_copy_of_a_submitted_folder_is_refused(tmp_path):
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123456789abcdef"
    with pytest.raises(InputError, match="Ray's temporary copy of the job's working directory, which is deleted"):
        check_directory(started(tmp_path, output=str(copy / "runs" / "first")), resume=True)
