"""Steps of a learner whose rows have different teachers, against dense computations and other micro-batches."""

import asyncio
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rayk.config import (
    DataConfig,
    DataSource,
    LogitKDConfig,
    MiniLLMConfig,
    OnPolicyConfig,
    RouteConfig,
    TrainingConfig,
    WorkerRollouts,
)  # fmt: skip
from rayk.data.batches import collate
from rayk.data.tokenizing import tokenize
from rayk.methods import LogitKD, MiniLLM, OnPolicy
from rayk.models import load_tokenizer
from rayk.rollouts import WorkerPolicy
from rayk.teachers import Route
from rayk.training.averaging import Averaging, Quarters, TeacherGroups
from rayk.training.learner import Learner
from rayk.training.ranks import Ranks
from rayk.training.student import LossModule, Student
from tests.runs import write_rows
from tests.teachers.helpers import EngineScorer
from tests.tiny import merge_padding

ROUTE = RouteConfig(field="domain", teachers={"a": "first", "b": "second"})
HIDDEN = {"kind": "hidden", "dtype": "float32"}


@pytest.fixture
def rows(tmp_path, tiny_student):
    """Rows of two domains, one of them with longer completions."""
    path = write_rows(tmp_path / "rows.jsonl", 7)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    for number, row in enumerate(found):
        row["domain"] = "ab"[number % 3 == 0]
        row["completion"] *= 1 + 2 * (row["domain"] == "b")
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    source = DataSource(path=str(path))
    return list(tokenize(source, DataConfig(train=source), load_tokenizer(tiny_student)))


@pytest.fixture(scope="module")
def route(tiny_teacher, second):
    return Route(ROUTE, {"first": EngineScorer(tiny_teacher), "second": EngineScorer(second)})


def step(method, experience, folder, micro_batch_tokens):
    """Return the metrics of one update of the student in `folder`, and its weights after it."""
    student = Student(AutoModelForCausalLM.from_pretrained(folder))
    settings = TrainingConfig(steps=1, learning_rate=1e-3, micro_batch_tokens=micro_batch_tokens)
    quarters = [Quarters(method.distance)] if hasattr(method, "distance") else []
    averaging = Averaging(method.settings.normalization, TeacherGroups(ROUTE), quarters)
    learner = Learner(LossModule(student, method).train(), settings, Ranks(0, 1, 1), "cpu", averaging)
    return learner.train_step([experience], 0, 1e-3), student.state_dict()


def test_a_step_is_the_dense_mean_of_the_teachers_means(rows, route, tiny_student, tiny_teacher, second):
    method = LogitKD(LogitKDConfig(support=HIDDEN, normalize="teachers"), route)
    experience = asyncio.run(method.prepare(collate(rows, 0)))
    found, state = step(method, experience, tiny_student, 150)
    models = {"first": tiny_teacher, "second": second, "student": tiny_student}
    models = {name: AutoModelForCausalLM.from_pretrained(folder) for name, folder in models.items()}
    losses: dict[str, list] = {"first": [], "second": []}
    for row in rows:
        name, places = ROUTE.teachers[row.fields["domain"]], np.flatnonzero(row.counted) - 1
        ids = torch.tensor(row.input_ids[None], dtype=torch.long)
        with torch.no_grad():
            log_p, log_q = (
                merge_padding(models[model](input_ids=ids).logits[0][places].double().log_softmax(1), route.vocab_size)
                for model in (name, "student")
            )
        losses[name].append((log_p.exp() * (log_p - log_q)).sum(1))
    means = {name: torch.cat(parts).mean().item() for name, parts in losses.items()}
    assert found["loss"] == pytest.approx(np.mean([*means.values()]), rel=1e-4)
    for name, mean in means.items():
        assert found[f"teacher/{name}/forward_kl"] == pytest.approx(mean, rel=1e-4)
    assert abs(found["loss"] - torch.cat([*losses["first"], *losses["second"]]).mean().item()) > 0.01
    whole, same = step(method, experience, tiny_student, 100_000)
    assert found == {name: pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in whole.items()}
    assert all(torch.allclose(state[name], same[name], atol=1e-5) for name in state)


@pytest.mark.parametrize("support", [HIDDEN, {"kind": "topk", "k": 20}, {"kind": "requested", "k": 20}], ids=str)
@pytest.mark.parametrize("kind", ["on_policy", "minillm"])
def test_rollouts_are_compared_with_their_own_teachers(kind, support, rows, route, tiny_student):
    student = AutoModelForCausalLM.from_pretrained(tiny_student)
    policy = WorkerPolicy(student, load_tokenizer(tiny_student), WorkerRollouts(max_new_tokens=8), batch_tokens=10_000)
    if kind == "on_policy":
        method = OnPolicy(OnPolicyConfig(support=support, normalize="teachers"), route, policy)
    else:
        method = MiniLLM(MiniLLMConfig(support=support, normalize="teachers", teacher_share=0), route, policy)
    batch = asyncio.run(method.sample(collate(rows, 0), list(range(len(rows))), 0.0))
    experience = asyncio.run(method.prepare(batch))
    (small, state), (whole, same) = (step(method, experience, tiny_student, tokens) for tokens in (60, 100_000))
    assert small == {name: pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in whole.items()}
    assert all(torch.allclose(state[name], same[name], atol=1e-5) for name in state)
    assert 0 < whole["overlap"] < 1 and 0 < whole["disagreement"] <= 1
    assert whole["teacher_entropy"] > 0 and whole["student_entropy"] > 0
    by_loss = [whole[f"teacher/{name}/loss"] for name in ("first", "second")]
    assert whole["loss"] == pytest.approx(np.mean(by_loss), rel=1e-4, abs=1e-6)
    counts = torch.bincount(Quarters("reverse_kl").of_tokens(experience), minlength=4)
    tokens = torch.bincount(TeacherGroups(ROUTE).of_tokens(experience), minlength=2)
    by_quarter = sum(whole[f"distance_quarter_{q + 1}"] * int(counts[q]) for q in range(4))
    by_teacher = sum(whole[f"teacher/{name}/reverse_kl"] * int(tokens[i]) for i, name in enumerate(("first", "second")))
    assert by_quarter == pytest.approx(by_teacher, rel=1e-4)
