"""`rayk evaluate` loads a model as the run does: its tokenizer, code and precision."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from rayk.config import StudentConfig, parse_config
from rayk.data.tokenizing import tokenize
from rayk.models import load_tokenizer
from rayk.run.evaluation import measured_student, tokenizer_for
from rayk.run.inputs import read_inputs
from rayk.training import Job
from rayk.training.worker import evaluate_worker
from tests import runs
from tests.tiny import tiny_model, tiny_tokenizer

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        with open(self.config.note, "w") as file:
            file.write(str(output.logits.dtype))
        return output
"""


@pytest.fixture
def own_model(tmp_path):
    """The folder of a model with code of its own, which writes the dtype of its last logits to the file `note`."""
    folder = tmp_path / "own"
    tiny_model(folder, hidden=16, layers=1, tokenizer=tiny_tokenizer())
    values = json.loads((folder / "config.json").read_text())
    values |= {
        "auto_map": {"AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnForCausalLM"},
        "model_type": "own_llama", "architectures": ["OwnForCausalLM"], "note": str(tmp_path / "note"),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "own_model.py").write_text(CODE)
    return str(folder)


def test_model_is_measured_with_the_students_code_and_precision(own_model, tmp_path):
    values = runs.settings(tmp_path, own_model)
    values["student"] |= {"trust_remote_code": True, "dtype": "bfloat16"}
    values["data"]["evaluation"] = values["data"]["train"]
    values["evaluation"] = {"generation": {"max_new_tokens": 2, "rows": 1}}
    config = parse_config(values)
    student = measured_student(config.student, own_model, None)
    tokenizer = load_tokenizer(own_model, trust_remote_code=True)
    table = tokenize(config.data.evaluation, config.data, tokenizer)
    measured = evaluate_worker(Job(config.model_copy(update={"student": student}), own_model, {}, None, table.table))
    assert measured.metrics["loss"] > 0
    assert (tmp_path / "note").read_text() == str(torch.bfloat16)


@pytest.mark.parametrize(("words", "kind"), [(2, "text"), (21, "open")])
def test_runs_settle_whether_answers_are_right_or_wrong(tmp_path, tiny_student, words, kind):
    values = runs.settings(tmp_path, tiny_student)
    rows = tmp_path / "held_out.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "completion": "one " * words}))
    values["data"]["evaluation"] = {"path": str(rows)}
    values["evaluation"] = {"generation": {"max_new_tokens": 2}}
    config = parse_config(values)
    assert read_inputs(config, {}).complete(config).evaluation.answer_type == kind


def test_configs_tokenizer_is_used_if_it_has_the_models_token_ids(tmp_path, tiny_student):
    same, other, bare = (str(tmp_path / name) for name in ("same", "other", "bare"))
    tiny_tokenizer(same, chat_template="{{ messages }}")
    tiny_tokenizer(other, sentences=("quite another text",))
    shutil.copytree(tiny_student, bare, ignore=shutil.ignore_patterns("tokenizer*", "special_tokens*", "chat_*"))
    assert tokenizer_for(tiny_student, StudentConfig(model=tiny_student)) is None
    assert tokenizer_for(tiny_student, StudentConfig(model=bare, tokenizer=same)) == same
    assert tokenizer_for(tiny_student, StudentConfig(model=bare, tokenizer=other)) is None
    assert tokenizer_for(bare, StudentConfig(model=bare, tokenizer=same)) == same
    assert tokenizer_for(bare, StudentConfig(model=tiny_student)) == tiny_student
    assert not list(Path(bare).glob("tokenizer*"))
