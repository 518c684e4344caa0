"""Sharded training equals that of one worker: on two gloo ranks, for every kind of student and micro-batches."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rayk.config import LogitKDConfig, TrainingConfig
from rayk.data.batches import collate
from rayk.data.examples import Example
from rayk.engines.transformers import TransformersEngine
from rayk.errors import InputError
from rayk.methods import LogitKD
from rayk.signals.sequence import TokenSequence
from rayk.training.ranks import Ranks
from rayk.training.sharding import _check_shards, find_blocks
from tests.architectures import make_architecture
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.sharded_training import Case, LocalTeacher, assert_equal, generate_and_train, train

pytestmark = pytest.mark.slow

RESHARD = pytest.mark.parametrize("reshard", ["last", "always"])
KD = LogitKDConfig(support={"kind": "topk", "k": 8}, temperature=2.0, hard_label_weight=0.3)


@pytest.fixture(scope="module")
def teacher(tiny_teacher):
    return LocalTeacher(TransformersEngine(tiny_teacher))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Students of two layers by whether embedding and head are tied."""
    root = tmp_path_factory.mktemp("students")
    for name, tie in (("untied", False), ("tied", True)):
        tiny_model(root / name, hidden=16, layers=2, tie=tie, tokenizer=tiny_tokenizer())
    return root


def sequences(count, seed):
    """Sequences of 4 to 40 tokens, of which the first half is not counted."""
    random = np.random.default_rng(seed)
    lengths = random.integers(4, 41, count)
    return [
        TokenSequence(random.integers(3, 356, n).astype(np.int32), np.arange(n) >= n // 2) for n in lengths.tolist()
    ]


def experiences(method, steps=3, count=9):
    return [asyncio.run(method.prepare(collate(sequences(count, step), 0))) for step in range(steps)]


def without_teacher(method_class, settings, teacher=None, **options):
    """The method as ranks use it, and its experiences."""
    return method_class(settings, None), experiences(method_class(settings, teacher), **options)


STUDENTS = {
    "lora": {"lora": {"r": 2}},
    "lora and a whole module": {"lora": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}},
    "lora on bfloat16": {"lora": {"r": 2}, "dtype": "bfloat16"},
    "cut": {"layers": [1]},
    "checkpointed": {"gradient_checkpointing": True},
}


@RESHARD
@pytest.mark.parametrize("student", STUDENTS)
def test_every_student_learns_the_same(student, reshard, pair, folders, teacher):
    values = {"model": str(folders / "untied"), **STUDENTS[student]}
    case = Case(values, *without_teacher(LogitKD, KD, teacher))
    results = pair.run(train, case, {"sharding": "fsdp", "reshard": reshard, "micro_batch_tokens": 60})
    # The frozen weights' products are rounded to bfloat16, by another order of sums.
    assert_equal(results, alone(case), tolerance=2e-3 if student == "lora on bfloat16" else 1e-4)


@RESHARD
@pytest.mark.parametrize("student", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointed"])
def test_compiled_blocks_learn_the_same(student, reshard, pair, folders, teacher):
    case = Case({"model": str(folders / "tied"), **student}, *without_teacher(LogitKD, KD, teacher), compiler="eager")
    results = pair.run(train_compiled, case, {"sharding": "fsdp", "reshard": reshard, "micro_batch_tokens": 60})
    assert_equal(results, alone(replace(case, compiler=None)))
    assert all(result["compiled"] for result in results)


def test_random_students_have_the_same_weights(pair, folders, teacher):
    values = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    values |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 384}
    case = Case({"config": values, "tokenizer": str(folders / "tied")}, *without_teacher(LogitKD, KD, teacher))
    assert_equal(pair.run(train, case, {"sharding": "fsdp"}), alone(case))


@RESHARD
def test_bfloat16_keeps_float32_weights(reshard, pair, folders, teacher):
    case = Case({"model": str(folders / "tied")}, *without_teacher(LogitKD, KD, teacher), {"precision": "bfloat16"})
    results = pair.run(train, case, {"sharding": "fsdp", "reshard": reshard, "micro_batch_tokens": 60})
    assert {tensor.dtype for tensor in results[0]["weights"].values()} == {torch.float32}
    expected = alone(case)
    # Autocast keeps the residual stream in float32, and sharding does not.
    for ours, theirs in zip(results[0]["steps"], expected["steps"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=0.05)


def test_each_rank_keeps_half_of_what_a_replica_keeps(pair, folders, teacher):
    case = Case({"model": str(folders / "untied")}, *without_teacher(LogitKD, KD, teacher))
    shards = pair.run(train, case, {"sharding": "fsdp"})
    copies = pair.run(train, case)
    for shard, copy in zip(shards, copies, strict=True):
        for kind in ("parameters", "gradients", "optimizer"):
            assert 0.45 * copy["bytes"][kind] <= shard["bytes"][kind] <= 0.55 * copy["bytes"][kind]
    assert_equal(shards, copies[0])


@pytest.mark.parametrize("shards", [1, 2])
def test_groups_of_shards_learn_the_same(shards, pair, folders, teacher):
    case = Case({"model": str(folders / "untied")}, *without_teacher(LogitKD, KD, teacher))
    results = pair.run(train, case, {"sharding": "hsdp", "shards": shards, "micro_batch_tokens": 60})
    assert_equal(results, alone(case))


def test_a_mesh_of_one_learns_the_same(folders, teacher):
    case = Case({"model": str(folders / "untied")}, *without_teacher(LogitKD, KD, teacher))
    try:
        shard = train(Ranks(0, 1, 1), case, {"sharding": "fsdp", "micro_batch_tokens": 60})
    finally:
        torch.distributed.destroy_process_group()
    assert_equal([shard], alone(case))


@pytest.mark.parametrize("staleness", [0, 1], ids=["learner", "copy"])
@RESHARD
def test_policies_use_the_learners_weights(reshard, staleness, pair, folders, teacher):
    folder, [experience] = str(folders / "tied"), experiences(LogitKD(KD, teacher), steps=1)
    ids = [sequence.input_ids[:3] for sequence in sequences(2, 5)]
    prompts = [Example(each, np.zeros(3, bool), None, 3, "a prompt") for each in ids]
    training = {"sharding": "fsdp", "reshard": reshard}
    results = pair.run(generate_and_train, folder, experience, training, staleness, prompts)
    expected = generate_and_train(Ranks(0, 1, 1), folder, experience, {}, staleness, prompts)
    for rank, result in enumerate(results):
        assert [each[0] for each in result["generations"]] == [each[rank] for each in expected["generations"]]
    assert results[0]["generations"][0] != results[0]["generations"][1]
    assert not results[1]["packed"]
    assert results[0]["packed"].keys() == expected["packed"].keys()
    for name, data in expected["packed"].items():
        np.testing.assert_allclose(
            results[0]["packed"][name].view(np.float32), data.view(np.float32), atol=1e-3, err_msg=name
        )


def test_a_model_without_known_blocks_is_refused():
    model = tiny_model()
    model._no_split_modules = []
    with pytest.raises(InputError, match="transformers names none for LlamaForCausalLM.*set it to none"):
        find_blocks(model)


def test_blocks_that_share_weights_are_refused():
    model = tiny_model(layers=2)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(InputError, match=r"'model.layers.0' and 'model.layers.1' share weights"):
        find_blocks(model)


def test_more_shards_than_rows_are_refused():
    _check_shards(find_blocks(tiny_model(hidden=16)), 32)
    with pytest.raises(InputError, match="has only 32 rows; use at most 32 workers"):
        _check_shards(find_blocks(tiny_model(hidden=16)), 33)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"workers": 0, "sharding": "fsdp"}, "'workers' is 0; set it to 1 or more"),
        ({"workers": {"min": 2, "max": 4}, "sharding": "hsdp"}, "hsdp' needs a fixed number of 'workers'"),
        ({"workers": {"min": 3, "max": 2}}, r"min \(3\) is larger than max \(2\)"),
        ({"workers": {"min": 1, "max": 64}}, r"'batch_size' \(32\) is below 'workers' \(64\)"),
        ({"workers": 3, "sharding": "hsdp", "shards": 2}, r"'workers' \(3\) is not a multiple of 'shards' \(2\)"),
        ({"workers": 2, "sharding": "fsdp", "shards": 2}, "'shards' is the size of a group with 'sharding: hsdp'"),
        ({"workers": 2, "sharding": "fsdp", "optimizer": "adamw_8bit"}, "'optimizer: adamw_8bit' has not been tested"),
    ],
)
def test_impossible_settings_are_refused(values, problem):
    with pytest.raises(ValidationError, match=problem):
        TrainingConfig(**values)


def train_compiled(*arguments):
    """`train` with `torch.compile`, which the other tests switch off."""
    torch.compiler.reset()
    torch._dynamo.config.disable = False
    try:
        return train(*arguments)
    finally:
        torch._dynamo.config.disable = True


def alone(case):
    return train(Ranks(0, 1, 1), case, {"micro_batch_tokens": 10_000})


@RESHARD
@pytest.mark.parametrize("tie", ["untied", "tied"])
@pytest.mark.parametrize("tokens", [10_000, 60])
def test_shards_learn_what_one_worker_learns(tokens, tie, reshard, pair, folders, teacher):
    case = Case({"model": str(folders / tie)}, *without_teacher(LogitKD, KD, teacher))
    results = pair.run(train, case, {"sharding": "fsdp", "reshard": reshard, "micro_batch_tokens": tokens})
    assert_equal(results, alone(case))


def test_students_that_compute_short_and_long_rows_apart_are_refused():
    with pytest.raises(InputError, match="does not work with the 'longrope' rotary embeddings of Phi3ForCausalLM"):
        find_blocks(make_architecture("phi3_longrope"))
