"""Each method learns the same from shards as on one worker, also if a unit has several rows and forward passes."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rayk.config import (
    InContextConfig,
    LayerwiseConfig,
    MiniLLMConfig,
    OnPolicyConfig,
    PreferenceConfig,
    SupervisedConfig,
    parse_config,
)
from rayk.config.rollouts import WorkerRollouts
from rayk.data.batches import collate
from rayk.data.demonstrations import DemonstrationPool
from rayk.data.examples import Example
from rayk.data.tokenizing import tokenize
from rayk.engines.transformers import TransformersEngine
from rayk.methods import InContext, Layerwise, MiniLLM, OnPolicy, Preference, Supervised
from rayk.models import load_model, load_tokenizer
from rayk.rollouts import WorkerPolicy
from rayk.training.ranks import Ranks
from rayk.training.student import Student
from tests.runs import settings, write_tasks
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.sharded_training import Case, LocalTeacher, Projected, assert_equal, train

pytestmark = pytest.mark.slow

STEPS, ROWS = 2, 7


@pytest.fixture(scope="module")
def teacher(tiny_teacher):
    return LocalTeacher(TransformersEngine(tiny_teacher))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("students") / "student"
    tiny_model(path, hidden=16, layers=2, tie=True, tokenizer=tiny_tokenizer())
    return str(path)


def answers(step, pairs=False):
    """Rows with a prompt of 2 tokens and an answer of 1 to 30; with `pairs`, also a rejected answer."""
    random = np.random.default_rng(step)
    rows = []
    for number in range(ROWS):
        prompt = random.integers(3, 356, 2)
        sides = [np.concatenate([prompt, random.integers(3, 356, n)]) for n in random.integers(1, 31, 2)]
        chosen, rejected = (
            Example(ids.astype(np.int32), np.arange(len(ids)) >= 2, None, 2, f"line {number}") for ids in sides
        )
        if pairs:
            chosen = Example(chosen.input_ids, chosen.counted, None, 2, chosen.where, rejected=rejected)
        rows.append(chosen)
    return rows


def prepared(method, batches):
    return [asyncio.run(method.prepare(collate(rows, 0))) for rows in batches]


def supervised(folder, teacher, tmp_path):
    method = Supervised(SupervisedConfig(), None)
    return method, prepared(method, map(answers, range(STEPS)))


def projected(folder, teacher, tmp_path):
    method = Projected(None, None)
    return method, prepared(method, map(answers, range(STEPS)))


def preference(folder, teacher, tmp_path):
    method = Preference(PreferenceConfig(beta=0.5), None)
    batches = [answers(step, pairs=True) for step in range(STEPS)]
    rows = [answer for batch in batches for row in batch for answer in row.answers]
    with torch.no_grad():
        method.precompute(Student(load_model(folder, dtype="float32")), [collate(rows, 0)], lambda value: [value])
    return Preference(PreferenceConfig(beta=0.5), None), prepared(method, batches)


def generated(kind, config, folder, teacher):
    tokenizer = load_tokenizer(folder)
    policy = WorkerPolicy(
        load_model(folder, dtype="float32"), tokenizer, WorkerRollouts(max_new_tokens=12), batch_tokens=10_000
    )
    method = kind(config, teacher, policy)
    experiences = []
    for step in range(STEPS):
        seeds = list(range(ROWS * step, ROWS * (step + 1)))
        batch = asyncio.run(method.sample(collate(answers(step), 0), seeds, 0.0))
        experiences.append(asyncio.run(method.prepare(batch)))
    return kind(config, None, None), experiences


def on_policy(folder, teacher, tmp_path):
    return generated(OnPolicy, OnPolicyConfig(support={"kind": "topk", "k": 8}), folder, teacher)


def minillm(folder, teacher, tmp_path):
    return generated(MiniLLM, MiniLLMConfig(teacher_share=0.0, support={"kind": "topk", "k": 8}), folder, teacher)


def in_context(folder, teacher, tmp_path):
    config = InContextConfig.model_validate({"kind": "in_context", "demonstrations": {"k": 2}, "text_weight": 0.5})
    write_tasks(tmp_path)
    data = parse_config(settings(tmp_path, folder)).data
    rows, tokenizer = tokenize(data.train, data, load_tokenizer(folder)), load_tokenizer(folder)
    pool = DemonstrationPool(rows, config, tokenizer, 1024)
    method = InContext(config, teacher)
    batches = [[pool.add_demonstrations(rows[ROWS * step + i], i, 0.0) for i in range(ROWS)] for step in range(STEPS)]
    return InContext(config, None), prepared(method, batches)


def matched_layers(teacher, **values):
    config = LayerwiseConfig(layers=[(0, 1), (1, 0)], **values)
    of_ranks = Layerwise(config, SimpleNamespace(info=teacher.info))
    return of_ranks, prepared(Layerwise(config, teacher), map(answers, range(STEPS)))


def layerwise(folder, teacher, tmp_path):
    return matched_layers(teacher)


def relations(folder, teacher, tmp_path):
    return matched_layers(teacher, distance="attention")


def filtered(folder, teacher, tmp_path):
    """The first step trains the filters, the second one the student."""
    return matched_layers(teacher, filters={"steps": 1})


METHODS = [supervised, projected, preference, on_policy, minillm, in_context, layerwise, relations, filtered]


@pytest.mark.parametrize("reshard", ["last", "always"])
@pytest.mark.parametrize("make", METHODS, ids=lambda make: make.__name__)
def test_shards_learn_what_one_worker_learns(make, reshard, pair, folder, teacher, tmp_path):
    case = Case({"model": folder}, *make(folder, teacher, tmp_path))
    # Of one token: each unit is a micro-batch, and a pair or query is computed row by row.
    results = pair.run(train, case, {"sharding": "fsdp", "reshard": reshard, "micro_batch_tokens": 1})
    assert_equal(results, train(Ranks(0, 1, 1), case, {"micro_batch_tokens": 10_000}))
