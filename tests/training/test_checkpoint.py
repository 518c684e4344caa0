"""A run's state survives interrupted writes, resumed runs and other workers."""

import shutil

import pytest
import torch

from rayk.config import parse_config
from rayk.errors import InputError, RunFailed
from rayk.methods import METHODS, Supervised
from rayk.run import distill
from rayk.serving.weights import trainable_state_dict
from rayk.training.checkpoint import Checkpoint, CheckpointStore
from tests.runs import assert_same_learning, config, curve, settings, weights
from tests.tiny import tiny_model, tiny_tokenizer


def checkpoint(step: int) -> Checkpoint:
    optimizer = {"state": {0: {"step": torch.tensor(float(step))}}, "param_groups": []}
    return Checkpoint(step, {"weight": torch.full((3, 2), float(step))}, optimizer, [{"seen": step}])


def assert_equal(one: Checkpoint | None, step: int) -> None:
    assert one is not None
    assert one.step == step
    assert torch.equal(one.model["weight"], checkpoint(step).model["weight"])
    assert (one.optimizer, one.method) == (checkpoint(step).optimizer, checkpoint(step).method)


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(str(tmp_path / "checkpoints"))
    for step in (10, 20):
        store.save(checkpoint(step), keep=5)
    return store


def test_newest_checkpoint_is_restored_unchanged(store):
    assert_equal(store.latest(), 20)


def test_empty_store_has_no_checkpoint(tmp_path):
    assert CheckpointStore(str(tmp_path / "nowhere")).latest() is None


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "method.pt", "manifest.json"])
@pytest.mark.parametrize("harm", ["missing", "truncated", "changed"])
def test_damaged_checkpoint_is_skipped_for_an_older_one(store, tmp_path, name, harm):
    file = tmp_path / "checkpoints" / "step-00000020" / name
    data = file.read_bytes()
    if harm == "missing":
        file.unlink()
    elif harm == "truncated":
        file.write_bytes(data[: len(data) // 2])
    else:
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert_equal(store.latest(), 10)
    store.save(checkpoint(20), keep=5)
    assert_equal(store.latest(), 20)


def test_only_the_newest_checkpoints_are_kept(store, tmp_path):
    store.save(checkpoint(30), keep=2)
    assert store.steps() == [20, 30]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000020", "step-00000030"]


def test_other_files_next_to_checkpoints_are_kept(store, tmp_path):
    (tmp_path / "checkpoints" / "notes").mkdir()
    (tmp_path / "checkpoints" / "notes" / "manifest.json").write_text("{}")
    assert store.steps() == [10, 20]


def test_checkpoints_may_be_at_any_uri(tmp_path):
    store = CheckpointStore(f"file://{tmp_path}/far")
    store.save(checkpoint(7), keep=1)
    assert_equal(store.latest(), 7)


def test_tied_weights_are_stored_once_and_restored_tied(tmp_path):
    tiny_model(tmp_path / "student", hidden=16, layers=1, tie=True, tokenizer=tiny_tokenizer())
    state = trainable_state_dict(tiny_model(hidden=16, layers=1, tie=True))
    assert "model.embed_tokens.weight" in state
    assert "lm_head.weight" not in state
    run_in_two_parts(tmp_path, str(tmp_path / "student"))


def run_in_two_parts(folder, student, **changes):
    """Run six steps at once, and six steps as a run of four that is resumed; both must be equal."""
    for name in ("whole", "parts"):
        (folder / name).mkdir()
    distill(config(folder / "whole", student, **changes))
    first = config(folder / "parts", student, checkpoint_every_steps=2, keep_checkpoints=5, **changes)
    distill(first)
    for path in (folder / "parts" / "run" / "checkpoints").glob("step-*6"):
        shutil.rmtree(path)
    shutil.rmtree(folder / "parts" / "run" / "model")
    distill(first, resume=True)
    assert_same_learning(folder / "whole" / "run", folder / "parts" / "run", 1e-6)


class StatefulMethod(Supervised):
    """Weighs the loss by the number of its steps: without its state the loss curve would differ."""

    def __init__(self, *arguments, **parts):
        super().__init__(*arguments, **parts)
        self.steps = 0
        self.average = torch.zeros(2)

    def loss(self, student, experience):
        loss = super().loss(student, experience)
        return type(loss)(loss.per_token * (1 + self.steps + self.average.sum()), loss.terms)

    def on_step(self, step):
        self.steps += 1
        self.average = 0.9 * self.average + 0.1 * self.steps

    def state_dict(self):
        return {"steps": self.steps, "average": self.average}

    def load_state_dict(self, state):
        self.steps, self.average = state["steps"], state["average"]


def test_method_state_is_restored(tmp_path, tiny_student, monkeypatch):
    monkeypatch.setitem(METHODS, "supervised", StatefulMethod)
    run_in_two_parts(tmp_path, tiny_student)


def test_resuming_a_finished_run_changes_nothing(tmp_path, tiny_student):
    (tmp_path / "again").mkdir()
    settings = config(tmp_path, tiny_student)
    distill(settings)
    losses, before = curve(settings.output_path), weights(settings.output_path)
    result = distill(settings, resume=True)
    assert curve(settings.output_path) == losses
    assert all((before[name] == value).all() for name, value in weights(settings.output_path).items())
    assert result.summary["steps"] == 6


def test_resumed_run_may_change_its_placement_but_no_learning_setting(tmp_path, tiny_student):
    first = settings(tmp_path, tiny_student)
    distill(parse_config(first))
    distill(parse_config(first | {"name": "other", "tracking": {"tensorboard": True}}), resume=True)
    distill(parse_config(first | {"training": first["training"] | {"micro_batch_tokens": 99}}), resume=True)
    for changes, named in [
        ({"seed": 1}, "seed"),
        ({"training": first["training"] | {"learning_rate": 1.0}}, "training.learning_rate"),
        ({"method": {"kind": "logit_kd"}, "teachers": [{"model": tiny_student}]}, "teachers"),
        ({"student": {"model": tiny_student, "dtype": "bfloat16"}}, "student.dtype"),
    ]:
        with pytest.raises(InputError, match=f"another '{named}'"):
            distill(parse_config(first | changes), resume=True)


def test_directory_of_another_run_is_refused(tmp_path, tiny_student):
    distill(config(tmp_path, tiny_student, checkpoints=str(tmp_path / "kept")))
    with pytest.raises(InputError, match="already contains a run, which was started before; continue it with"):
        distill(config(tmp_path, tiny_student))
    with pytest.raises(InputError, match=r"training.checkpoints .* contains checkpoints of a run"):
        distill(config(tmp_path, tiny_student, checkpoints=str(tmp_path / "kept")), output=str(tmp_path / "new"))
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    for taken in ("file", "full"):
        with pytest.raises(InputError, match="is not a run directory"):
            distill(config(tmp_path, tiny_student), output=str(tmp_path / taken))


def test_infinite_gradient_stops_the_run_at_its_last_good_step(tmp_path, tiny_student, monkeypatch):
    class Exploding(Supervised):
        exploding = True

        def loss(self, student, experience):
            loss = super().loss(student, experience)
            factor = float("nan") if self.exploding and self.at == 3 else 1.0
            return type(loss)(loss.per_token * factor, loss.terms)

        at = 0

        def on_step(self, step):
            self.at = step

    (tmp_path / "whole").mkdir()
    distill(config(tmp_path / "whole", tiny_student))
    monkeypatch.setitem(METHODS, "supervised", Exploding)
    settings = config(tmp_path, tiny_student)
    with pytest.raises(RunFailed, match="gradient of step 4 is not finite"):
        distill(settings)
    assert CheckpointStore(str(settings.output_path / "checkpoints")).steps() == [3]
    Exploding.exploding = False
    distill(settings, resume=True)
    assert_same_learning(tmp_path / "whole" / "run", settings.output_path, 1e-6)
