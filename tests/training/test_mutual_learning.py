"""Teachers that are the student of another run: they have the weights of its newest checkpoint."""

import os
import shutil
import signal

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayk.config import parse_config
from rayk.errors import InputError
from rayk.methods import METHODS
from rayk.run import distill
from rayk.run.export import export_model
from rayk.run.inputs import read_inputs
from tests.clusters import LocalCluster
from tests.runs import config, curve, metrics, rayk, settings, wait_until
from tests.tiny import tiny_model

TOP = {"kind": "topk", "k": 16}


def following_settings(folder, student, other, model, **training):
    """Settings of a run in `folder` whose teacher is the student of the run in `other`."""
    folder.mkdir(exist_ok=True)
    method = {"kind": "logit_kd", "support": TOP}
    values = settings(folder, student, method, **({"batch_size": 4, "learning_rate": 1e-2} | training))
    values["teachers"] = [
        {"name": "peer", "follows": {"run": str(other)}, "model": str(model), "every": 2}
        | {"resources": {"num_cpus": 0.25}}
    ]
    return values


@pytest.fixture
def watched(monkeypatch):
    """Per step: its rows and the log-probs that the teacher gave their tokens; and what happens after a step."""
    rows, logprobs, events = {}, {}, {}

    class Watching(METHODS["logit_kd"]):
        step = 0

        def loss(self, student, experience):
            rows.setdefault(self.step, []).extend(experience.batch.sequences)
            logprobs.setdefault(self.step, []).append(experience.signals.target_logprobs)
            return super().loss(student, experience)

        def on_step(self, step):
            self.step = step
            events.get(step, lambda: None)()

    monkeypatch.setitem(METHODS, "logit_kd", Watching)
    return rows, logprobs, events


@pytest.mark.cluster
def test_teacher_has_the_newest_checkpoint_of_the_other_run(watched, tmp_path, tiny_student, tiny_teacher, ray_cluster):
    """The other run starts after three steps, writes another checkpoint after five, and is deleted after seven."""
    rows, logprobs, events = watched
    (tmp_path / "other").mkdir()
    other = config(tmp_path / "other", tiny_teacher, steps=8, checkpoint_every_steps=4, keep_checkpoints=9)
    distill(other)
    models = {0: str(tiny_teacher)}
    for step in (4, 8):
        models[step] = export_model(other.output_path, str(tmp_path / f"at-{step}"), step).model
    place, late = tmp_path / "peer", tmp_path / "late"
    shutil.move(other.output_path / "checkpoints" / "step-00000008", late)
    events[3] = lambda: shutil.move(other.output_path, place)
    events[5] = lambda: shutil.move(late, place / "checkpoints" / "step-00000008")
    events[7] = lambda: shutil.rmtree(place)
    run = parse_config(following_settings(tmp_path / "own", tiny_student, place, tiny_teacher, steps=10))
    distill(run)
    steps = [0, 0, 0, 0, 4, 4, 8, 8, 8, 8]
    assert curve(run.output_path, "other_run_step") == steps
    assert curve(run.output_path, "teacher_version") == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8]
    tokenizer = AutoTokenizer.from_pretrained(tiny_student)
    for version, folder in models.items():
        model = AutoModelForCausalLM.from_pretrained(folder)
        for step, expected in enumerate(steps):
            own = torch.cat([own_logprobs(model, tokenizer, row) for row in rows[step]])
            same = torch.allclose(torch.cat(logprobs[step]), own, atol=1e-3)
            assert same == (version == expected), f"step {step}, weights of step {version}"


def own_logprobs(model, tokenizer, row):
    """Log-probs of the row's completion."""
    ids = torch.tensor(row.input_ids.tolist())
    with torch.no_grad():
        found = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return found[row.prompt_tokens - 1 :]


@pytest.mark.cluster
@pytest.mark.long
def test_two_runs_teach_each_other_although_one_is_killed(tmp_path, tiny_student, tiny_teacher):
    """The first is killed; the second continues with its last checkpoint, and with newer ones once it is resumed."""
    models = {"first": tiny_student, "second": tiny_teacher}
    outputs = {}
    for name, other in (("first", "second"), ("second", "first")):
        folder = tmp_path / name
        values = following_settings(
            folder, models[name], tmp_path / other / "run", models[other], steps=120, checkpoint_every_steps=10
        )
        (folder / "run.yaml").write_text(yaml.safe_dump(values))
        outputs[name] = folder / "run"

    def reached(name):
        return max((row["step"] for row in metrics(outputs[name])), default=0)

    with LocalCluster() as cluster:
        cluster.start_head(cpus=4)
        start = {"RAY_ADDRESS": cluster.address}
        first, second = ((tmp_path / name / "run.yaml", tmp_path / f"{name}.log") for name in models)
        with rayk("run", second[0], log=second[1], **start) as continuing:
            with rayk("run", first[0], log=first[1], **start) as killed:
                wait_until(lambda: reached("second") >= 5, "step 5 of the second run", continuing)
                continuing.send_signal(signal.SIGSTOP)  # so that it is not over before the first has come far enough
                wait_until(lambda: reached("first") >= 20, "step 20 of the first run", killed)
                os.killpg(killed.pid, signal.SIGKILL)
            before = reached("second")
            continuing.send_signal(signal.SIGCONT)
            wait_until(lambda: reached("second") >= before + 6, "the second run alone", continuing)
            continuing.send_signal(signal.SIGSTOP)  # until the first has been resumed
            paused, last = reached("second"), curve(outputs["second"], "other_run_step")[-1]
            with rayk("run", first[0], "--resume", log=tmp_path / "resumed.log", **start) as resumed:
                wait_until(lambda: reached("first") >= 60, "step 60 of the first run", resumed)
                continuing.send_signal(signal.SIGCONT)
                wait_until(lambda: resumed.poll() is not None, "the end of the first run")
                wait_until(lambda: continuing.poll() is not None, "the end of the second run")
        assert (resumed.returncode, continuing.returncode) == (0, 0)
    for name in models:
        assert curve(outputs[name], "step") == list(range(1, 121))
        seen = curve(outputs[name], "other_run_step")
        assert seen == sorted(seen), name
        assert seen[-1] > 0, name
    assert paused < 120
    assert last < curve(outputs["second"], "other_run_step")[-1]


def test_a_run_that_has_not_started_is_named(tmp_path, tiny_student):
    config = parse_config(following_settings(tmp_path, tiny_student, tmp_path / "peer", tiny_student, steps=2))
    expected = f"'peer' follows the run in '{tmp_path / 'peer'}', which has not started; until its first checkpoint"
    assert any(expected in note for note in read_inputs(config, {}).notes)
    (tmp_path / "peer").mkdir()
    (tmp_path / "peer" / "config.yaml").touch()
    assert not any("has not started" in note for note in read_inputs(config, {}).notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "needs 'model', from which the other run's student started"),
        ({"ema": 0.9}, "leave it out"),
        ({"follows": {"run": "own/run"}}, "this run's own directory; write 'follows: student'"),
        ({"follows": {"run": "s3://bucket/run"}}, "follows.run is a URI"),
        ({"engine": {"kind": "vllm"}}, "needs engine kind 'transformers'"),
    ],
)
def test_settings_that_cannot_be_followed_are_named(change, message, tmp_path, tiny_student, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = following_settings(tmp_path / "own", tiny_student, tmp_path / "peer", "m", steps=2)
    values["teachers"][0] |= change
    with pytest.raises(InputError, match=message):
        parse_config(values)


@pytest.mark.cluster
def test_adapter_of_the_other_run_is_refused(tmp_path, tiny_student, ray_cluster):
    values = following_settings(tmp_path / "own", tiny_student, tmp_path / "peer", tiny_student, steps=2)
    (tmp_path / "peer").mkdir()
    other = values | {"teachers": [], "method": {"kind": "supervised"}}
    other = other | {"student": {"model": str(tiny_student), "lora": {"r": 2}}}
    (tmp_path / "peer" / "config.yaml").write_text(yaml.safe_dump(other))
    with pytest.raises(InputError, match="Teacher 'peer': the run in .* trains an adapter, which cannot be followed"):
        distill(parse_config(values))


@pytest.mark.cluster
def test_student_of_another_shape_is_refused_in_one_sentence(tmp_path, tiny_student, ray_cluster):
    (tmp_path / "other").mkdir()
    other = config(tmp_path / "other", tiny_student, steps=1, checkpoint_every_steps=1)
    distill(other)
    wider = tmp_path / "wider"
    tiny_model(wider, hidden=32, tokenizer=AutoTokenizer.from_pretrained(tiny_student))
    values = following_settings(tmp_path / "own", tiny_student, other.output_path, wider, steps=2)
    message = (
        r"Teacher 'peer': the run in '.*run' trains another model than the teacher's '.*wider': \d+ tensors have "
        r"another name or shape, such as \S+\.weight, which is \(384, 16\) there and \(384, 32\) in the teacher\."
    )
    with pytest.raises(InputError, match=message):
        distill(parse_config(values))
