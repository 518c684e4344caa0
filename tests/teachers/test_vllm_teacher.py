"""A teacher on vLLM and Ray Serve. The last test kills its engine."""

import asyncio
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from rayk.config import parse_config
from rayk.config.support import TopK
from rayk.engines.base import SamplingParameters
from rayk.engines.transformers import TransformersEngine
from rayk.run import distill
from rayk.serving import application
from rayk.teachers import serve_teacher
from tests.runs import curve, settings, wait_until
from tests.teachers.helpers import assert_signals_close, random_sequences, teacher_config, vllm_processes
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.cluster

SEQUENCES, PROMPTS = random_sequences(20), [np.arange(4, 12), np.arange(20, 25)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    tiny_model(folder, hidden=128, tokenizer=tiny_tokenizer())
    return str(folder)


@pytest.fixture(scope="module")
def twin(folder):
    return TransformersEngine(folder)


@pytest.fixture(scope="module")
def expected(twin):
    return asyncio.run(twin.score(SEQUENCES, TopK(16)))


@pytest.fixture(scope="module")
def teacher(ray_cluster, folder):
    # With a worker in a separate process (see conftest), which must not outlive the replica either.
    arguments = {"enforce_eager": True, "distributed_executor_backend": "mp"}
    engine = {"kind": "vllm", "dtype": "float32", "arguments": arguments}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(application, "_HEALTH_CHECK_SECONDS", 1.0)
        with serve_teacher(teacher_config("vllm", folder, engine=engine)) as teacher:
            yield teacher


def test_vllm_teacher_equals_transformers(teacher, twin, expected):
    generated = asyncio.run(twin.generate(PROMPTS, SamplingParameters(12, 0.0), [0, 0]))
    assert teacher.info.supports == ("topk", "requested", "sampled", "hidden", "logprob")
    assert_signals_close(teacher.score(SEQUENCES, TopK(16)), expected)
    completions = teacher.generate(PROMPTS, max_new_tokens=12, temperature=0.0)
    assert [one.token_ids.tolist() for one in completions] == [one.token_ids.tolist() for one in generated]


def test_vllm_teacher_generates_scores_and_is_evaluated_in_one_run(teacher, twin, tmp_path, tiny_student):
    """The teacher generates the rows, scores them, and is evaluated beside the student."""
    values = settings(tmp_path, tiny_student, {"kind": "logit_kd", "support": {"kind": "topk", "k": 16}}, steps=12)
    questions = tmp_path / "questions.jsonl"
    rows = [{"prompt": f"{n} + {n} =", "answer": str(2 * n)} for n in range(24)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(questions)}
    values |= {
        "teachers": [{"name": "vllm", "attach": True}],
        "data": {"train": source, "evaluation": source | {"completion_field": "answer"}},
        "synthesis": {"kind": "responses", "samples": 2, "sampling": {"max_new_tokens": 10}, "filters": []},
        "evaluation": {"generation": {"max_new_tokens": 6}, "every_steps": 6},
    }
    result = distill(parse_config(values))
    generated = pq.read_table(result.output / "synthesis" / "rows.parquet").to_pylist()
    assert len(generated) == 48 == result.summary["rows"]["train"]
    assert len({row["completion"] for row in generated}) > 24
    losses = curve(result.output)
    assert losses[-1] < losses[0]
    student = result.summary["student"]
    assert 0 < student["forward_kl"] < np.inf
    assert {"loss", "accuracy", "agreement"} <= student.keys()
    assert "Synthesized training rows" in (result.output / "report.html").read_text()


def test_vllm_teacher_and_student_synthesize_rows_and_pairs(teacher, folder, tmp_path):
    values = settings(tmp_path, folder, steps=2)
    values |= {
        "teachers": [{"name": "vllm", "attach": True}], "data": {}, "output": str(tmp_path / "magpie"),
        "synthesis": {
            "kind": "magpie", "instructions": 16, "instruction_filters": [], "filters": [], "role_words": [],
            "sampling": {"max_new_tokens": 40, "stop": ["e"]}, "responses": {"max_new_tokens": 10},
        },
    }  # fmt: skip
    made = pq.read_table(distill(parse_config(values)).output / "synthesis" / "rows.parquet").to_pylist()
    assert len({row["prompt"] for row in made}) > 4
    assert all("e" not in row["prompt"] and row["completion"] for row in made)

    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in made))
    values = settings(tmp_path, folder, "preference", steps=2)
    engine = {"kind": "vllm", "dtype": "float32", "arguments": {"enforce_eager": True}}
    values |= {
        "teachers": [{"name": "vllm", "attach": True}], "data": {"train": {"path": str(questions)}},
        "synthesis": {
            "kind": "preferences", "chat": True, "sampling": {"max_new_tokens": 8}, "filters": [],
            "student": {"engine": engine, "resources": {"num_cpus": 0.25}},
        },
    }  # fmt: skip
    output = distill(parse_config(values)).output
    pairs = pq.read_table(output / "synthesis" / "rows.parquet").to_pylist()
    assert len(pairs) == len(made)
    assert all(row["chosen"] != row["rejected"] and row["rejected_tokens"] for row in pairs)


def test_replica_with_a_killed_engine_is_replaced(teacher, expected):
    replica, core, _ = vllm_processes("vllm", "VLLM::EngineCore", "VLLM::Worker")
    core.kill()
    retries = teacher.statistics.retries
    assert_signals_close(teacher.score(SEQUENCES, TopK(16)), expected)
    assert teacher.statistics.retries > retries
    successor, *processes = vllm_processes("vllm", "VLLM::EngineCore", "VLLM::Worker")
    assert successor.pid != replica.pid
    successor.kill()  # vLLM's processes must end with it, because they occupy memory
    wait_until(lambda: not any(each.is_running() for each in processes), seconds=60)
