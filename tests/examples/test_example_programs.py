"""The examples in this folder run, and agree with each other and with `rayk.distill`."""

import asyncio

import pytest

import rayk
from tests import runs
from tests.examples import hf_trainer, notebook, plain_loop


@pytest.fixture
def data(tmp_path):
    return str(runs.write_rows(tmp_path / "rows.jsonl"))


@pytest.fixture
def expected(served, tiny_student, data):
    """The losses of the plain loop."""
    losses = plain_loop.train(served, tiny_student, data)
    assert len(losses) == 6 and losses[-1] < losses[0]
    return losses


def test_plain_loop_starts_as_a_run_does(expected, tmp_path, tiny_student):
    """The run takes the rows in another order, so only the first losses are comparable, and roughly."""
    run = runs.config(tmp_path, tiny_student, {"kind": "logit_kd", "support": {"kind": "topk", "k": 64}})
    rayk.distill(run)
    assert runs.curve(tmp_path / "run")[0] == pytest.approx(expected[0], rel=0.2)


def test_loop_inside_the_trainer_of_transformers_is_the_plain_loop(expected, served, tmp_path, tiny_student, data):
    losses = hf_trainer.train(served, tiny_student, data, str(tmp_path / "hf"))
    assert losses == pytest.approx(expected, abs=2e-3)


def test_cells_of_a_notebook_train_as_the_plain_loop_does(expected, tiny_student, data):
    async def notebook_session():
        other_cell = asyncio.create_task(asyncio.sleep(0))
        losses = await notebook.cells("served", tiny_student, data)
        await other_cell
        return losses

    assert asyncio.run(notebook_session()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.long
def test_a_teacher_and_a_run_work_inside_a_running_event_loop(tmp_path, tiny_student, tiny_teacher, ray_cluster):
    async def notebook_session():
        settings = rayk.TeacherConfig(name="cell", model=tiny_teacher, resources={"num_cpus": 0.25})
        with rayk.serve_teacher(settings) as teacher:
            texts = teacher.generate(["Question:"], max_new_tokens=4)
        values = runs.settings(tmp_path, tiny_student, "logit_kd", steps=2)
        values["teachers"] = [{"name": "own", "model": tiny_teacher, "resources": {"num_cpus": 0.25}}]
        return texts, rayk.distill(rayk.RunConfig(**values))

    [completion], result = asyncio.run(notebook_session())
    assert len(completion.token_ids) <= 4
    assert result.summary["steps"] == 2
