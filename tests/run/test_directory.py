"""What a finished run leaves is complete and can be used without rayk."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayk.config import load_config, parse_config
from rayk.run import Watcher, distill
from rayk.training.checkpoint import CheckpointStore
from tests.runs import settings, write_rows
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_the_saved_student_is_the_one_that_was_trained(tmp_path, tie):
    tiny_model(tmp_path / "student", hidden=16, layers=1, tie=tie, tokenizer=tiny_tokenizer())
    result = distill(parse_config(settings(tmp_path, str(tmp_path / "student"))))
    model = AutoModelForCausalLM.from_pretrained(result.model)
    trained = CheckpointStore(str(result.output / "checkpoints")).latest().model
    copy = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    before = copy.state_dict()["model.embed_tokens.weight"].clone()
    copy.load_state_dict({name.removeprefix("student.model."): value for name, value in trained.items()}, strict=False)
    tokenizer = AutoTokenizer.from_pretrained(result.model)
    ids = tokenizer("the cat sat on 12 + 34", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, copy(ids).logits)
    assert not torch.equal(before, model.state_dict()["model.embed_tokens.weight"])
    assert not (result.output / "model.unfinished").exists()


def test_a_run_directory_is_complete(tmp_path, tiny_student, served):
    class Watching(Watcher):
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
    watching = Watching()
    result = distill(parse_config(values), watcher=watching)

    assert load_config(result.output / "config.yaml") == load_config(
        result.output / "config.yaml", output=str(result.output)
    )
    assert load_config(result.output / "config.yaml").training.steps == 4
    rows = [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]
    assert rows == watching.seen
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
