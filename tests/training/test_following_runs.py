"""Runs whose teacher follows the student: each step learns from exactly the weights that the settings say."""

import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayk.config import parse_config
from rayk.methods import METHODS
from rayk.run import distill, teacher_applications
from tests.integration.test_deaths import Striking
from tests.runs import assert_same_learning, curve, settings
from tests.teachers.helpers import replica_processes

pytestmark = pytest.mark.cluster

TEMPLATE = "The answer is {answer}.\n{prompt}"
TOP = {"kind": "topk", "k": 16}


def run_config(folder, student, method, follower=None, rollouts=None, **training):
    folder.mkdir(exist_ok=True)
    values = settings(folder, student, method, **({"steps": 5, "batch_size": 4, "learning_rate": 1e-2} | training))
    values["teachers"] = [
        {"name": "self", "follows": "student", "prompt_template": TEMPLATE, "resources": {"num_cpus": 0.25}}
        | (follower or {})
    ]
    if rollouts is not None:
        values["rollouts"] |= rollouts
    return parse_config(values)


@pytest.fixture
def watched(monkeypatch):
    """Per step: the student's weights before it, its rows, and the log-probs that the teacher gave their tokens."""
    states, rows, logprobs = {}, {}, {}

    def watching(base):
        class Watching(base):
            step = 0

            def loss(self, student, experience):
                if self.step not in states:
                    states[self.step] = {name: value.clone() for name, value in student.model.state_dict().items()}
                rows.setdefault(self.step, []).extend(experience.batch.sequences)
                logprobs.setdefault(self.step, []).append(experience.signals.target_logprobs)
                return super().loss(student, experience)

            def on_step(self, step):
                self.step = step

        return Watching

    for kind in ("on_policy", "logit_kd"):
        monkeypatch.setitem(METHODS, kind, watching(METHODS[kind]))
    return states, rows, logprobs


def teacher_states(states, ema, every):
    """The teacher's weights after each number of steps, from the definition."""
    found = [states[0]]
    for step in range(1, len(states)):
        last = found[-1]
        mixed = {name: ema * last[name] + (1 - ema) * value for name, value in states[step].items()}
        found.append(last if step % every else mixed)
    return found


@pytest.mark.parametrize(
    ("method", "follower", "staleness"),
    [
        ({"kind": "on_policy", "support": TOP}, {"ema": 0.5}, [0, 1, 1, 1, 1]),
        ({"kind": "on_policy", "support": {"kind": "hidden", "dtype": "float32"}}, {}, [0, 1, 1, 1, 1]),
        ({"kind": "logit_kd", "support": {"kind": "hidden", "dtype": "float32"}}, {"every": 2}, [0, 1, 0, 1, 0]),
    ],
    ids=["average", "copy", "every 2 steps"],
)
@pytest.mark.long
def test_each_step_learns_from_the_version_that_the_settings_say(
    method, follower, staleness, watched, tmp_path, tiny_student, ray_cluster
):
    states, rows, logprobs = watched
    rollouts = {"max_staleness": 1} if method["kind"] == "on_policy" else None
    run = run_config(tmp_path, tiny_student, method, follower, rollouts)
    distill(run)
    assert curve(run.output_path, "teacher_staleness") == staleness
    assert curve(run.output_path, "teacher_version") == [step - age for step, age in enumerate(staleness)]
    expected = teacher_states(states, follower.get("ema", 0.0), follower.get("every", 1))
    model, tokenizer = (each.from_pretrained(tiny_student) for each in (AutoModelForCausalLM, AutoTokenizer))
    for step, age in enumerate(staleness):
        given = torch.cat(logprobs[step])
        for version, state in enumerate(expected):
            model.load_state_dict(state)
            own = torch.cat([own_logprobs(model, tokenizer, row) for row in rows[step]])
            same = torch.allclose(given, own, atol=1e-3)
            equal = all(torch.equal(state[name], value) for name, value in expected[step - age].items())
            assert same == equal, f"step {step}, version {version}"


def own_logprobs(model, tokenizer, row):
    """Log-probs of the row's completion after the teacher's prompt."""
    prompt = tokenizer(TEMPLATE.format(**row.fields), add_special_tokens=False).input_ids
    ids = torch.tensor([*prompt, *row.input_ids[row.prompt_tokens :].tolist()])
    with torch.no_grad():
        found = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return found[len(prompt) - 1 :]


@pytest.mark.long
def test_killed_replica_gets_the_latest_weights_and_a_resumed_run_its_average(tmp_path, tiny_student, ray_cluster):
    """The checkpoint is between two updates of the teacher."""
    method, follower = {"kind": "on_policy", "support": TOP}, {"ema": 0.5, "every": 4}
    training = {"steps": 30, "checkpoint_every_steps": 10, "keep_checkpoints": 9}
    distill(run_config(tmp_path / "whole", tiny_student, method, follower, **training))
    hurt = run_config(tmp_path / "hurt", tiny_student, method, follower, **training)
    listener = Striking(6, lambda: replica_processes(teacher_applications(hurt)["self"])[0].kill())
    distill(hurt, listener=listener)
    assert listener.struck.is_set()
    assert_same_learning(tmp_path / "whole" / "run", hurt.output_path, 1e-3)
    for step in (20, 30):
        shutil.rmtree(hurt.output_path / "checkpoints" / f"step-{step:08d}")
    shutil.rmtree(hurt.output_path / "model")
    distill(hurt, resume=True)
    assert_same_learning(tmp_path / "whole" / "run", hurt.output_path, 1e-3)
    np.testing.assert_array_equal(curve(hurt.output_path, "teacher_version"), [step - step % 4 for step in range(30)])


@pytest.mark.nightly
def test_neither_workers_nor_sharding_change_a_result(tmp_path, tiny_student, ray_cluster):
    """And an average of sharded weights is resumed by one worker."""
    method, follower = {"kind": "logit_kd", "support": TOP}, {"ema": 0.5, "replicas": 2}
    training = {"steps": 6, "checkpoint_every_steps": 3, "keep_checkpoints": 9}
    distill(run_config(tmp_path / "one", tiny_student, method, follower, **training))
    many = run_config(tmp_path / "two", tiny_student, method, follower, workers=2, sharding="fsdp", **training)
    distill(many)
    assert_same_learning(tmp_path / "one" / "run", many.output_path)
    shutil.rmtree(many.output_path / "checkpoints" / "step-00000006")
    shutil.rmtree(many.output_path / "model")
    distill(run_config(tmp_path / "two", tiny_student, method, follower, **training), resume=True)
    assert_same_learning(tmp_path / "one" / "run", many.output_path)
