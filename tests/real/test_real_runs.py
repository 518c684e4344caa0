"""Whole runs with real models: SmolLM2 teaches a student cut from it, and writes its rows.

The stated values were measured on 2 CPU cores in float32; tolerances leave room for other kernels.
"""

import json
import sys

import pyarrow.parquet as pq
import pytest
import yaml

from rayk import cli
from rayk.config import parse_config
from rayk.run import distill, synthesize
from tests.runs import metrics

pytestmark = pytest.mark.cluster

COMPARED_SHARE = 0.974
"""Distributions that are compared, relative to the student's tokens: most tokens end where one of Gemma 3's does."""
QUESTIONS = [
    "What is the capital of France?", "Name three primary colors.", "What is two plus two?", "Who wrote Hamlet?",
    "What do bees make?", "Name a large animal that lives in Africa.", "What is ice?", "What is the opposite of hot?",
    "Write one sentence about the moon.", "Which planet do we live on?", "How many days are in a week?",
    "What is bread made of?", "Name two fruits.", "Why do people sleep?", "What is a bicycle?", "What falls in winter?",
]  # fmt: skip


@pytest.fixture(scope="module")
def teacher(ray_cluster, smollm2):
    from rayk.config import TeacherConfig
    from rayk.teachers import serve_teacher

    with serve_teacher(TeacherConfig(name="smollm2", model=smollm2, resources={"num_cpus": 0.5})) as teacher:
        yield teacher


@pytest.fixture(scope="module")
def rows(teacher, tmp_path_factory):
    """The teacher's greedy answers to the questions, written by `rayk synthesize`."""
    folder = tmp_path_factory.mktemp("rows")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in QUESTIONS))
    config = base(folder / "run", smollm2_of(teacher), prompts)
    config["synthesis"] = {
        "kind": "responses", "teacher": "smollm2", "chat": True,
        "sampling": {"max_new_tokens": 40, "temperature": 0.0},
    }  # fmt: skip
    synthesize(parse_config(config))
    return folder / "run" / "synthesis" / "rows.parquet"


def smollm2_of(teacher):
    return teacher.info.model


def base(output, student, rows, **changes):
    values = {
        "output": str(output),
        "teachers": [{"name": "smollm2", "attach": True}],
        "student": {"model": student, "layers": 10},
        "data": {"train": {"path": str(rows)}, "chat_template": True},
        "method": {"kind": "logit_kd", "support": {"kind": "topk", "k": 64}},
        "training": {
            "workers": 0, "steps": 6, "batch_size": 8, "learning_rate": 5e-4, "resources": {"num_cpus": 0.5},
            "checkpoint_every_steps": 1000,
        },
        "tracking": {"tensorboard": False},
    }  # fmt: skip
    return values | changes


def test_the_teacher_writes_true_rows(rows):
    written = {row["prompt"]: row["completion"] for row in pq.read_table(rows).to_pylist()}
    assert written["What is the capital of France?"] == "The capital of France is Paris."
    assert len(written) >= 5  # the others are longer than 40 tokens


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(rows, smollm2, tmp_path):
    config = base(tmp_path / "run", smollm2, rows)
    config["student"].pop("layers")
    config["training"] |= {"steps": 1}
    distill(parse_config(config))
    (row,) = metrics(tmp_path / "run")
    assert abs(row["loss"]) < 1e-4


def test_a_cut_student_recovers(rows, smollm2, tmp_path):
    config = base(tmp_path / "run", smollm2, rows)
    config["data"]["evaluation"] = {"path": str(rows)}
    config["evaluation"] = {"generation": {"max_new_tokens": 24, "rows": 4}}
    config["training"] |= {"steps": 24}
    summary = distill(parse_config(config)).summary
    before, after = summary["student_before"], summary["student"]
    assert before["forward_kl"] == pytest.approx(12.42, rel=0.02)
    assert after["forward_kl"] < 0.5 * before["forward_kl"]
    assert {"before", "teacher", "text"} <= summary["samples"][0].keys()


@pytest.mark.parametrize("method", ["on_policy", "minillm"])
def test_a_student_learns_on_its_own_text(rows, smollm2, tmp_path, method):
    config = base(tmp_path / "run", smollm2, rows, rollouts={"max_new_tokens": 16})
    config["method"] = {"kind": method}
    config["training"] |= {"steps": 2, "batch_size": 4}
    distill(parse_config(config))
    first, last = metrics(tmp_path / "run")
    assert first["rollout_tokens"] > 1
    assert first["loss"] == first["loss"] and last["loss"] == last["loss"]


def test_a_teacher_with_another_tokenizer_is_learned_from(rows, smollm2, gemma3, tmp_path):
    """Gemma 3, whose tokens are others, teaches SmolLM2's cut: the plain rows, aligned by bytes."""
    config = base(tmp_path / "run", smollm2, rows)
    config["teachers"] = [{"name": "gemma3", "model": gemma3, "resources": {"num_cpus": 0.5}}]
    config["data"] |= {"chat_template": False, "train": {"path": str(plain_rows(rows, tmp_path))}}
    config["method"] = {"kind": "logit_kd", "support": {"kind": "topk", "k": 32}, "alignment": {"kind": "bytes"}}
    config["training"] |= {"steps": 12}
    distill(parse_config(config))
    steps = metrics(tmp_path / "run")
    assert steps[0]["aligned"] == 1 and steps[0]["compared"] == pytest.approx(COMPARED_SHARE, abs=0.02)
    assert steps[-1]["loss"] < 0.4 * steps[0]["loss"]


def plain_rows(rows, folder):
    """Write the rows as plain text, with a space between question and answer."""
    path = folder / "plain.jsonl"
    written = pq.read_table(rows).to_pylist()
    texts = [{"prompt": row["prompt"], "completion": " " + row["completion"]} for row in written]
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return path


def test_magpie_invents_questions_and_answers(smollm2, teacher, tmp_path):
    config = base(tmp_path / "run", smollm2, "none") | {"data": {"chat_template": True}}
    config["synthesis"] = {
        "kind": "magpie", "teacher": "smollm2", "instructions": 12, "role_words": ["assistant"],
        "sampling": {"max_new_tokens": 40, "temperature": 0.7}, "responses": {"max_new_tokens": 24},
        "instruction_filters": [{"kind": "length", "minimum": 2}], "filters": [],
    }  # fmt: skip
    synthesize(parse_config(config))
    written = pq.read_table(tmp_path / "run" / "synthesis" / "rows.parquet").to_pylist()
    assert len(written) == len({row["prompt"] for row in written}) >= 4
    for row in written:
        assert len(row["prompt"].split()) >= 2 and row["completion"].strip()
        assert "<|im_" not in row["prompt"] + row["completion"]


def test_evaluate_measures_a_model_beside_the_teacher(rows, smollm2, teacher, tmp_path, monkeypatch, capsys):
    config = base(tmp_path / "run", smollm2, rows)
    config["student"].pop("layers")
    config["data"]["evaluation"] = {"path": str(rows)}
    config["evaluation"] = {"generation": {"max_new_tokens": 40}, "metrics": ["rouge_l"]}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    model = tmp_path / "model"
    model.symlink_to(smollm2)
    monkeypatch.setattr(sys, "argv", ["rayk", "evaluate", str(path), "--model", str(model), "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    student = json.loads(capsys.readouterr().out)["student"]
    assert student["forward_kl"] == pytest.approx(0, abs=1e-4) and student["agreement"] == 1
    assert student["rouge_l"] > 0.98  # the rows are the model's own greedy answers


def test_doctor_passes(rows, smollm2, tmp_path, monkeypatch):
    config = base(tmp_path / "run", smollm2, rows, teachers=[{"name": "teacher", "model": smollm2}])
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "argv", ["rayk", "doctor", str(path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
