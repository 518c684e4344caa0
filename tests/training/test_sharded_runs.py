"""Whole runs of a sharded student on two gloo ranks: evaluation, checkpoints, resumption, and the saved model."""

import shutil

import pytest
from transformers import AutoModelForCausalLM

from rayk.config import parse_config
from rayk.run.inputs import read_inputs
from rayk.training.job import Job
from rayk.training.loop import Trainer
from rayk.training.ranks import Ranks
from tests.runs import assert_same_learning, metrics, settings, write_rows
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    tiny_model(folder, hidden=16, layers=2, tie=True, tokenizer=tiny_tokenizer())
    return str(folder)


def job_of(folder, student, method="supervised", student_settings=None, **training):
    """A run of 4 steps with evaluations, whose rows are not alike for the ranks."""
    folder.mkdir(exist_ok=True)
    values = settings(folder, student, method, **{"steps": 4, "checkpoint_every_steps": 2, **training})
    values["student"] |= student_settings or {}
    values["data"]["evaluation"] = {"path": str(write_rows(folder / "evaluation.jsonl", count=5, seed=7))}
    values["evaluation"] = {"every_steps": 2, "generation": {"max_new_tokens": 9, "rows": 3}}
    config = parse_config(values)
    config.output_path.mkdir(exist_ok=True)
    inputs = read_inputs(config, {})
    return Job(
        config, inputs.tokenizer_name, {}, inputs.train.table, inputs.evaluation.table, views=inputs.views,
        trained_ends=inputs.trained_ends,
    )  # fmt: skip


def run_job(ranks, job):
    trainer = Trainer(job, ranks)
    try:
        return trainer.run()
    finally:
        trainer.close()


SHARDED = {"workers": 2, "sharding": "fsdp", "micro_batch_tokens": 150}


@pytest.mark.parametrize("adapter", [None, {"r": 2}], ids=["whole", "lora"])
@pytest.mark.parametrize("reshard", ["last", "always"])
def test_a_run_equals_that_of_one_worker_and_is_resumed_with_one(reshard, adapter, tmp_path, pair, student):
    chosen = {"lora": adapter} if adapter else {}
    alone = job_of(tmp_path / "alone", student, student_settings=chosen)
    run_job(Ranks(0, 1, 1), alone)
    sharded = job_of(tmp_path / "sharded", student, student_settings=chosen, reshard=reshard, **SHARDED)
    outcomes = pair.run(run_job, sharded)
    run, expected = sharded.config.output_path, alone.config.output_path
    assert_same_learning(run, expected)
    for ours, theirs in zip(metrics(run), metrics(expected), strict=True):
        for name in theirs:
            if name.startswith("evaluation_"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name
    assert outcomes[0].size == outcomes[1].size and outcomes[0].evaluation.answers
    AutoModelForCausalLM.from_pretrained(run / "model")
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    shutil.rmtree(run / "model")
    resumed = job_of(tmp_path / "sharded", student, student_settings=chosen)
    run_job(Ranks(0, 1, 1), resumed)
    assert_same_learning(run, expected)


def test_a_run_of_one_worker_is_resumed_sharded(tmp_path, pair, student):
    alone = job_of(tmp_path / "alone", student)
    run_job(Ranks(0, 1, 1), alone)
    begun = job_of(tmp_path / "begun", student)
    run_job(Ranks(0, 1, 1), begun)
    shutil.rmtree(begun.config.output_path / "checkpoints" / "step-00000004")
    pair.run(run_job, job_of(tmp_path / "begun", student, **SHARDED))
    assert_same_learning(begun.config.output_path, alone.config.output_path)
