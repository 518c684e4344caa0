"""A run's state survives interrupted writes, resumed runs and other workers."""

import json
import shutil
import threading

import pytest
import torch

from rayk.config import parse_config
from rayk.errors import InputError, RunFailed
from rayk.methods import METHODS, Supervised
from rayk.run import ProgressListener, distill
from rayk.serving.weights import trainable_state_dict
from rayk.training.checkpoint import CheckpointStore
from rayk.training.ranks import AllRanksStop
from tests.checkpoints import SmallRun
from tests.runs import assert_same_learning, config, curve, settings, weights
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def folder(tmp_path):
    """Two checkpoints of one attempt."""
    run = SmallRun(str(tmp_path / "checkpoints"))
    run.checkpoints.restore()
    for step in (10, 20):
        run.train()
        run.save(step)
    return tmp_path / "checkpoints"


def restored_step(folder) -> int:
    return SmallRun(str(folder), seed=1).checkpoints.restore()[0]


def test_empty_store_has_no_checkpoint(tmp_path):
    assert restored_step(tmp_path / "nowhere") == 0


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "values-00000.safetensors", "manifest.json"])
@pytest.mark.parametrize("harm", ["missing", "truncated", "changed", "emptied"])
def test_damaged_checkpoint_is_skipped_for_an_older_one(folder, name, harm):
    [file] = (folder / "step-00000020").glob(f"*.{name}")
    data = file.read_bytes()
    if harm == "missing":
        file.unlink()
    else:
        file.write_bytes({"truncated": data[: len(data) // 2], "changed": data[:-1] + b"?", "emptied": b""}[harm])
    run = SmallRun(str(folder), seed=1)
    assert run.checkpoints.restore() == (10, True)
    run.train()
    run.save(20)
    assert restored_step(folder) == 20


@pytest.mark.parametrize("text", ["null", "[]", '{"step": 20}', '{"step": 20, "files": 3}', "{" * 5000, "\ud800"])
def test_nonsense_in_a_manifest_is_a_damaged_checkpoint(folder, text):
    [file] = (folder / "step-00000020").glob("*.manifest.json")
    file.write_text(text, errors="surrogatepass")
    assert restored_step(folder) == 10


def test_manifest_cannot_name_files_elsewhere(folder, tmp_path):
    [file] = (folder / "step-00000020").glob("*.manifest.json")
    values = json.loads(file.read_text())
    values["files"]["../../secret"] = {"bytes": 0, "crc32": 0}
    (tmp_path / "secret").write_text("")
    file.write_text(json.dumps(values))
    assert CheckpointStore(str(folder)).manifest(20) is None


def test_only_the_newest_checkpoints_and_the_best_are_kept(tmp_path):
    run = SmallRun(str(tmp_path), keep=2)
    run.checkpoints.restore()
    run.train()
    for step in (10, 20, 30, 40):
        run.best.step = 10
        run.save(step)
    assert CheckpointStore(str(tmp_path)).steps() == [10, 30, 40]
    assert {path.name for path in tmp_path.iterdir()} == {"attempts", "step-00000010", "step-00000030", "step-00000040"}


def test_other_files_next_to_checkpoints_are_kept(folder):
    (folder / "notes").mkdir()
    (folder / "notes" / "manifest.json").write_text("{}")
    assert CheckpointStore(str(folder)).steps() == [10, 20]


def test_checkpoints_may_be_at_any_uri(tmp_path):
    run = SmallRun(f"file://{tmp_path}/far")
    run.checkpoints.restore()
    run.train()
    run.save(7)
    assert restored_step(f"file://{tmp_path}/far") == 7


def test_the_older_of_two_savers_is_fenced_off(folder):
    """An older attempt that goes on, such as after a network failure, must neither be resumed from nor delete."""
    old = SmallRun(str(folder))
    assert old.checkpoints.restore()[0] == 20
    new = SmallRun(str(folder), seed=1)
    assert new.checkpoints.restore()[0] == 20
    old.train(3)
    with pytest.raises(AllRanksStop, match="Another process has continued this run"):
        old.save(30)
    assert CheckpointStore(str(folder)).steps() == [10, 20]
    new.train()
    new.save(30)
    assert CheckpointStore(str(folder)).manifest(30).attempt == new.checkpoints.attempt


def test_a_manifest_that_an_older_attempt_still_wrote_does_not_count(folder):
    store = CheckpointStore(str(folder))
    old, new = store.register(), store.register()
    store.begin_from(old, 20)
    store.begin_from(new, 20)
    for step in (20, 30):
        for path in (
            folder / "step-00000020"
        ).iterdir():  # as if `old` had looked for newer attempts before `new` began
            late = folder / f"step-{step:08d}" / f"{old}.{path.name.partition('.')[2]}"
            late.parent.mkdir(exist_ok=True)
            manifest = json.loads(path.read_text()) if path.suffix == ".json" else None
            names = {name: f"{old}.{name.partition('.')[2]}" for name in (manifest or {}).get("files", {})}
            if manifest is None:
                shutil.copy(path, late)
            else:
                files = {names[name]: digest for name, digest in manifest["files"].items()}
                late.write_text(json.dumps(manifest | {"step": step, "attempt": old, "files": files}))
    assert store.steps() == [10, 20]
    assert store.manifest(20).attempt == old  # the step from which the new attempt may itself have continued


def test_of_many_savers_at_once_only_the_newest_writes(tmp_path):
    """Each attempt is registered, so all but the newest are told to stop; none meets a half-written manifest."""
    runs = [SmallRun(str(tmp_path), seed=number) for number in range(8)]
    for run in runs:
        run.checkpoints.restore()
        run.train()
    stopped = []

    def save(run):
        for step in range(1, 13):
            try:
                run.save(step)
            except AllRanksStop as stop:
                stopped.append(str(stop))

    threads = [threading.Thread(target=save, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stopped) == 7 * 12 and all("Another process has continued" in sentence for sentence in stopped)
    assert CheckpointStore(str(tmp_path)).steps() == list(range(8, 13))


def test_store_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AllRanksStop, match="The checkpoints cannot be written to .*file/below'") as stop:
        SmallRun(str(tmp_path / "file" / "below")).checkpoints.restore()
    assert isinstance(stop.value.problem, InputError)


@pytest.mark.slow
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


@pytest.mark.slow
def test_method_state_is_restored(tmp_path, tiny_student, monkeypatch):
    monkeypatch.setitem(METHODS, "supervised", StatefulMethod)
    run_in_two_parts(tmp_path, tiny_student)


class Stages(ProgressListener):
    """Collects the sentence on the run directory."""

    def __init__(self):
        self.found = []

    def stage(self, text):
        self.found += [text] if text.startswith("The run directory is ") else []


@pytest.mark.slow
def test_a_resumed_run_says_where_it_begins(tmp_path, tiny_student):
    stages = Stages()
    run = config(tmp_path, tiny_student, checkpoint_every_steps=2, steps=2)
    for _ in range(2):
        distill(run, resume=True, listener=stages)
    for path in (tmp_path / "run" / "checkpoints").glob("step-*"):
        shutil.rmtree(path)
    distill(run, resume=True, listener=stages)
    assert [text.removeprefix(f"The run directory is {tmp_path}/run") for text in stages.found] == [
        ": a new run, because there was none to resume",
        ", resumed at step 2",
        ", resumed before its first checkpoint",
    ]


def test_checkpoints_are_due_by_time_too(tmp_path, tiny_student):
    training = {"steps": 3, "checkpoint_every_steps": 100, "keep_checkpoints": 100}
    for minutes, steps in ((1e-6, [1, 2, 3]), (60.0, [3])):
        (folder := tmp_path / str(minutes)).mkdir()
        run = config(folder, tiny_student, checkpoint_every_minutes=minutes, **training)
        distill(run)
        assert CheckpointStore(run.checkpoints).steps() == steps


@pytest.mark.slow
def test_resuming_a_finished_run_changes_nothing(tmp_path, tiny_student):
    (tmp_path / "again").mkdir()
    settings = config(tmp_path, tiny_student)
    distill(settings)
    losses, before = curve(settings.output_path), weights(settings.output_path)
    result = distill(settings, resume=True)
    assert curve(settings.output_path) == losses
    assert all((before[name] == value).all() for name, value in weights(settings.output_path).items())
    assert result.summary["steps"] == 6


@pytest.mark.slow
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


@pytest.mark.slow
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
