"""Runs whose rows have different teachers, against dense computations and against other divisions of the work."""

import asyncio
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayk.commands.status import status
from rayk.config import MiniLLMConfig, OnPolicyConfig, RouteConfig, WorkerRollouts, parse_config
from rayk.data.batches import BatchSampler, collate
from rayk.data.tokenizing import tokenize
from rayk.errors import InputError
from rayk.methods import MiniLLM, OnPolicy
from rayk.models import load_tokenizer
from rayk.rollouts import Rollout, WorkerPolicy
from rayk.run import distill
from rayk.teachers import Route
from tests.runs import assert_same_learning, curve, metrics, settings, write_rows
from tests.tiny import merge_padding

ROUTE = {"field": "domain", "teachers": {"a": "served", "b": "another"}}
HIDDEN = {"kind": "hidden", "dtype": "float32"}


def routed(folder, student, method, **training):
    """Settings of a run on rows of two domains, one of them with longer completions."""
    folder.mkdir(exist_ok=True)
    rows = [json.loads(line) for line in write_rows(folder / "rows.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["domain"] = "ab"[number % 3 == 0]
        row["completion"] *= 1 + 2 * (row["domain"] == "b")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    teachers = [{"name": "served", "attach": True}, {"name": "another", "attach": True}]
    return settings(folder, student, method, **training) | {"teachers": teachers, "route": ROUTE}


def dense_kl(student, teacher, row, vocab_size):
    """KL(p‖q) at each counted token of a row, [tokens]."""
    ids, places = torch.tensor(row.input_ids[None], dtype=torch.long), np.flatnonzero(row.counted) - 1
    with torch.no_grad():
        log_p, log_q = (
            merge_padding(model(input_ids=ids).logits[0][places].double().log_softmax(1), vocab_size)
            for model in (teacher, student)
        )
    return (log_p.exp() * (log_p - log_q)).sum(1)


def test_a_step_is_the_dense_mean_of_the_teachers_means(
    tmp_path, tiny_student, tiny_teacher, second, served, second_served
):
    method = {"kind": "logit_kd", "support": HIDDEN, "normalize": "teachers"}
    run = parse_config(routed(tmp_path, tiny_student, method, steps=1, micro_batch_tokens=150))
    distill(run)
    [found] = metrics(tmp_path / "run")
    table = tokenize(run.data.train, run.data, AutoTokenizer.from_pretrained(tiny_student))
    models = {"served": tiny_teacher, "another": second, "student": tiny_student}
    models = {name: AutoModelForCausalLM.from_pretrained(folder) for name, folder in models.items()}
    losses: dict[str, list] = {"served": [], "another": []}
    for index in BatchSampler(table.lengths, 8, run.seed, 1).rows(0):
        row = table[int(index)]
        name = ROUTE["teachers"][row.fields["domain"]]
        losses[name].append(dense_kl(models["student"], models[name], row, served.info.vocab_size))
    means = {name: torch.cat(parts).mean().item() for name, parts in losses.items()}
    assert found["loss"] == pytest.approx(np.mean([*means.values()]), rel=1e-4)
    for name, mean in means.items():
        assert found[f"teacher/{name}/forward_kl"] == pytest.approx(mean, rel=1e-4)
        assert found[f"teacher/{name}/tokens"] == sum(map(len, losses[name]))
        assert found[f"teacher/{name}/score_seconds"] > 0
    assert abs(found["loss"] - torch.cat([*losses["served"], *losses["another"]]).mean().item()) > 0.01
    [text] = status(tmp_path / "run")
    assert f"served: loss {found['teacher/served/loss']:.4f}, " in text["teachers"]


@pytest.mark.long
def test_workers_and_micro_batches_change_neither_learning_nor_metrics(tmp_path, tiny_student, served, second_served):
    method = {"kind": "on_policy", "support": HIDDEN, "normalize": "teachers"}
    for name, training in (("alone", {}), ("group", {"workers": 2, "micro_batch_tokens": 120})):
        distill(parse_config(routed(tmp_path / name, tiny_student, method, steps=3, **training)))
    alone, group = tmp_path / "alone" / "run", tmp_path / "group" / "run"
    assert_same_learning(alone, group)
    quarters = [f"distance_quarter_{number}" for number in (1, 2, 3, 4)]
    compared = ["overlap", "disagreement", "teacher_entropy", "student_entropy", *quarters]
    for name in [*compared, *(f"teacher/{teacher}/loss" for teacher in ("served", "another"))]:
        np.testing.assert_allclose(curve(alone, name), curve(group, name), rtol=1e-3, atol=1e-4, err_msg=name)
        assert min(curve(alone, name)) >= 0 and max(curve(alone, name)) > 0


@pytest.fixture
def rows(tmp_path, tiny_student):
    run = parse_config(routed(tmp_path, tiny_student, "logit_kd"))
    return list(tokenize(run.data.train, run.data, load_tokenizer(tiny_student)))[:6]


@pytest.fixture
def policy(tiny_student):
    student = AutoModelForCausalLM.from_pretrained(tiny_student)
    return WorkerPolicy(student, load_tokenizer(tiny_student), WorkerRollouts(max_new_tokens=6), batch_tokens=10_000)


def sample(method, rows, seeds):
    return asyncio.run(method.sample(collate(rows, 0), seeds, 0.0)).sequences


@pytest.mark.parametrize(
    "make",
    [
        lambda *parts: OnPolicy(OnPolicyConfig(student_fraction=0, teacher_written=1), *parts),
        lambda *parts: MiniLLM(MiniLLMConfig(teacher_share=0.5), *parts),
    ],
    ids=["teacher_written", "teacher_share"],
)
def test_the_rows_own_teacher_writes(make, rows, policy, served, second_served):
    teachers = {"served": served, "another": second_served}
    routed = make(Route(RouteConfig(**ROUTE), teachers), policy)
    seeds = list(range(len(rows)))
    found = sample(routed, rows, seeds)
    for name, teacher in teachers.items():
        own = [i for i, row in enumerate(rows) if ROUTE["teachers"][row.fields["domain"]] == name]
        alone = sample(make(teacher, policy), [rows[i] for i in own], [seeds[i] for i in own])
        assert [found[i].input_ids.tolist() for i in own] == [row.input_ids.tolist() for row in alone]
        assert all(found[i].fields == rows[i].fields for i in own)
    others = sample(make(served, policy), rows, seeds)
    assert any(one.input_ids.tolist() != other.input_ids.tolist() for one, other in zip(found, others, strict=True))
    if isinstance(routed, MiniLLM):
        assert all(isinstance(row, Rollout) and row.teacher_calls for row in found)
        domains = [{rows[i].fields["domain"] for i in group} for group in routed.groups(collate(rows, 0), seeds, 0.0)]
        assert sorted(map(tuple, domains)) == [("a",), ("b",)]


def test_a_field_that_rows_lack_is_refused_at_the_start(tmp_path, tiny_student, served, second_served):
    values = routed(tmp_path, tiny_student, "logit_kd")
    for route, message in (
        (ROUTE | {"field": "topic"}, "rows.jsonl, line 1 has no value in the field 'topic'"),
        (ROUTE | {"field": "topic", "default": "served"}, "No row has the field 'topic', by which route.field"),
    ):
        with pytest.raises(InputError, match=message):
            distill(parse_config(values | {"route": route}))
