"""Weights are transferred completely, in the requested version, while a worker may still request them."""

import asyncio
import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from rayk.config import LoraConfig
from rayk.models.lora import add_adapter
from rayk.serving.weight_store import PublishedWeights, UnusableWeights, WeightStore, WeightVersion
from rayk.serving.weights import checksum, load_weights, pack_weights, trainable_state_dict
from tests.tiny import perturb, tiny_model

FIRST = WeightVersion("attempt", 0)


def copy_weights(weights):
    """Return a read-only copy, as Ray delivers it."""
    copies = {}
    for name, packed in weights.items():
        copies[name] = replace(packed, data=packed.data.copy())
        copies[name].data.flags.writeable = False
    return copies


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tie", [False, True])
def test_weights_are_copied_to_another_model(dtype, tie):
    learner, model = (tiny_model(seed=seed, tie=tie).to(dtype) for seed in (1, 2))
    weights = copy_weights(pack_weights(learner))
    assert ("lm_head.weight" in weights) == (not tie)
    load_weights(model, weights, checksum(weights), FIRST)
    assert all(torch.equal(value, learner.state_dict()[name]) for name, value in model.state_dict().items())


def test_weights_are_sent_in_the_type_in_which_replicas_compute():
    learner, model = (tiny_model(seed=seed) for seed in (1, 2))
    whole, weights = pack_weights(learner), copy_weights(pack_weights(learner, torch.bfloat16))
    assert 2 * sum(map(count_parameters, weights.values())) == sum(map(count_parameters, whole.values()))
    load_weights(model, weights, checksum(weights), FIRST)
    for name, value in model.state_dict().items():
        assert torch.equal(value, learner.state_dict()[name].bfloat16().float())


def test_frozen_weights_are_not_transferred():
    learner, model = tiny_model(seed=1), tiny_model(seed=2)
    for each in (learner, model):
        each.requires_grad_(False)
        each.lm_head.weight.requires_grad_(True)
    body = copy.deepcopy(model.model.state_dict())
    weights = copy_weights(pack_weights(learner))
    assert list(weights) == ["lm_head.weight"]
    load_weights(model, weights, checksum(weights), FIRST)
    assert torch.equal(model.lm_head.weight, learner.lm_head.weight)
    assert all(torch.equal(value, body[name]) for name, value in model.model.state_dict().items())


def test_only_the_adapter_is_transferred():
    learner, replica = (tiny_model(seed=1, hidden=64, vocab_size=2048) for _ in range(2))
    whole = pack_weights(learner)
    for seed, each in enumerate((learner, replica)):
        add_adapter(each, LoraConfig(r=2), seed, "base")
    weights = copy_weights(pack_weights(perturb(learner)))
    assert all(".lora_" in name for name in weights)
    assert sum(map(count_parameters, weights.values())) < sum(map(count_parameters, whole.values())) / 20
    with pytest.raises(UnusableWeights, match="damaged"):
        load_weights(replica, flip_byte(weights), checksum(weights), FIRST)
    with pytest.raises(UnusableWeights, match="belong to another model"):
        load_weights(replica, whole, checksum(whole), FIRST)
    load_weights(replica, weights, checksum(weights), FIRST)
    assert all(torch.equal(value, learner.state_dict()[name]) for name, value in replica.state_dict().items())


def count_parameters(packed):
    return packed.data.nbytes


def test_persistent_buffers_are_transferred():
    learner, model = tiny_model(seed=1), tiny_model(seed=1)
    for each, value in ((learner, 3.0), (model, 5.0)):
        each.register_buffer("scale", torch.tensor(value))
    weights = copy_weights(pack_weights(learner))
    load_weights(model, weights, checksum(weights), FIRST)
    assert float(model.scale) == 3.0
    assert trainable_state_dict(model)["scale"] is model.scale


def flip_byte(weights):
    name = list(weights)[3]
    data = weights[name].data.copy()
    data[len(data) // 2] ^= 1
    return weights | {name: replace(weights[name], data=data)}


def drop_tensor(weights):
    return dict(list(weights.items())[1:])


def swap_tensors(weights):
    """Exchange two tensors of the same shape."""
    one, other = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
    return weights | {one: weights[other], other: weights[one]}


def transpose_shape(weights):
    name = "lm_head.weight"
    return weights | {name: replace(weights[name], shape=weights[name].shape[::-1])}


@pytest.mark.parametrize("damage", [flip_byte, drop_tensor, swap_tensors, transpose_shape])
def test_damaged_weights_leave_the_model_unchanged(damage):
    learner, model = tiny_model(seed=1), tiny_model(seed=2)
    before = copy.deepcopy(model.state_dict())
    weights = copy_weights(pack_weights(learner))
    with pytest.raises(UnusableWeights, match="weights of version 0 were damaged"):
        load_weights(model, damage(weights), checksum(weights), FIRST)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_of_another_model_are_rejected():
    weights = copy_weights(pack_weights(tiny_model(hidden=16)))
    with pytest.raises(UnusableWeights, match="belong to another model"):
        load_weights(tiny_model(hidden=32), weights, checksum(weights), FIRST)


def published(number):
    return PublishedWeights(number, np.zeros(0))  # the store does not look at the location


def run_store(*work):
    """Return the last result of `work`, applied in order to a store that hardly waits."""

    async def main():
        store = WeightStore(wait_seconds=0.05)
        await store.begin("attempt")
        return [await each(store) for each in work][-1]

    return asyncio.run(main())


def publish(*numbers, attempt="attempt"):
    async def work(store):
        for number in numbers:
            await store.publish(WeightVersion(attempt, number), published(number))

    return work


def find(number, attempt="attempt"):
    return lambda store: store.find(WeightVersion(attempt, number))


def begin(attempt):
    return lambda store: store.begin(attempt)


def test_the_newest_two_versions_are_kept():
    assert run_store(publish(3, 4, 5), find(5)).checksum == 5
    assert run_store(publish(3, 4, 5), find(4)).checksum == 4
    with pytest.raises(UnusableWeights, match="weights of version 3 are stale"):
        run_store(publish(3, 4, 5), find(3))


def test_a_version_that_is_not_published_is_an_error():
    with pytest.raises(UnusableWeights, match=r"weights of version 6 were not published within 0.05 s"):
        run_store(publish(5), find(6))
    with pytest.raises(UnusableWeights, match="not published"):
        run_store(publish(5), find(5, attempt="unknown"))


def test_find_waits_for_a_version():
    async def main():
        store = WeightStore(wait_seconds=30)
        waiting = asyncio.create_task(store.find(WeightVersion("next", 1)))
        for work in (begin("next"), publish(0, attempt="next"), publish(1, attempt="next")):
            await asyncio.sleep(0)
            assert not waiting.done()
            await work(store)
        return await waiting

    assert asyncio.run(main()).checksum == 1


def test_versions_of_an_earlier_attempt_are_dropped():
    with pytest.raises(UnusableWeights, match="version 5 are stale"):
        run_store(publish(5), begin("next"), publish(5, attempt="next"), find(5))
    assert run_store(publish(5), begin("next"), publish(4, attempt="next"), find(4, "next")).checksum == 4


@pytest.mark.parametrize(
    "work",
    [
        [publish(5, 5)],
        [publish(5, 4)],
        [publish(5), begin("next"), publish(6)],
    ],
)
def test_a_stale_update_is_rejected(work):
    with pytest.raises(UnusableWeights, match="stale and were not published"):
        run_store(*work)
