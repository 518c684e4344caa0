"""A policy's replica that writes with vLLM, for real, on the CPU; one engine for all, with the model cut into two
parts (tensor parallel). The last test kills it."""

import asyncio
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch

from rayk.config import StudentConfig, VLLMPolicyEngineConfig
from rayk.config.support import Logprob, TopK
from rayk.engines.base import SamplingParameters
from rayk.errors import EngineDied
from rayk.models import load_model, real_vocab_size
from rayk.models.student import make_model
from rayk.rollouts.policy_model import PolicyModel
from rayk.rollouts.vllm_backend import VersionLock, full_state_dict, start_vllm
from rayk.serving.weight_store import PublishedWeights, UnusableWeights, WeightVersion
from rayk.serving.weights import checksum, pack_weights
from rayk.signals.sequence import TokenSequence
from tests.rollouts.test_policy import VOCABULARY
from tests.tiny import perturb, tiny_model, tiny_tokenizer

PARAMETERS = SamplingParameters(max_new_tokens=16)
PROMPTS = [np.arange(4, 4 + length, dtype=np.int32) for length in (3, 20, 9)]


class There:
    """Weights that are at hand, where Ray's object store would have them."""

    def __init__(self, weights):
        self._weights = weights

    def __await__(self):
        yield from ()
        return self._weights


class Versions:
    """The student as it learns: its model after so many steps, and what is published of it."""

    def __init__(self, folder):
        self._folder = folder

    def model(self, number):
        model = load_model(self._folder)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * number * torch.ones_like(parameter).cumsum(0).sin())
        return model.eval()

    def published(self, number):
        weights = pack_weights(self.model(number))
        return WeightVersion("attempt", number), PublishedWeights(checksum(weights), There(weights))

    def writer(self, number):
        return PolicyModel(self.model(number), tiny_tokenizer())


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    """Of a student whose embedding is its head, and padded by rows that would be likely tokens."""
    folder = str(tmp_path_factory.mktemp("student"))
    model = tiny_model(seed=1, hidden=128, peaked=2.0, tie=True)
    with torch.no_grad():
        model.lm_head.weight[VOCABULARY:] *= 2
    model.save_pretrained(folder)
    tiny_tokenizer(folder)
    assert model.config.vocab_size > real_vocab_size(tiny_tokenizer())
    return Versions(folder)


@pytest.fixture(scope="module")
def vllm(versions, on_loop):
    # From an architecture: vLLM has no folder of the student's to read. The integration test starts from one.
    architecture = load_model(versions._folder).config.to_dict() | {"architectures": None}
    student = StudentConfig(config=architecture, tokenizer=versions._folder)
    engine = VLLMPolicyEngineConfig(tensor_parallel_size=2, arguments={"enforce_eager": True})
    started = on_loop(start_vllm(versions.writer(0), student, engine, tokenizer=versions._folder, precision="float32"))
    yield started
    started._engine.close()


async def write(vllm, versions, number, seed=0, parameters=PARAMETERS):
    items = [(prompt, seed + i) for i, prompt in enumerate(PROMPTS)]
    return await vllm.answer(*versions.published(number), parameters, items, [0] * len(items))


def texts(written):
    return [each.token_ids.tolist() for each in written]


def sequences_of(written):
    return [
        TokenSequence(
            np.concatenate([prompt, each.token_ids]), np.arange(len(prompt) + len(each.token_ids)) >= len(prompt)
        )
        for prompt, each in zip(PROMPTS, written, strict=True)
    ]


def test_each_version_generates_and_scores_with_its_weights(vllm, versions, on_loop):
    seen = []
    for number in (1, 2, 1, 0):
        written, again = (on_loop(write(vllm, versions, number)) for _ in range(2))
        assert texts(written) == texts(again)
        sequences = sequences_of(written)
        there = versions.writer(number)
        with there.computing():
            expected = there.logprobs(sequences)
            likeliest = there.top_ids(sequences, 5)
            greedy = there.generate(PROMPTS, replace(PARAMETERS, temperature=0.0), [0, 0, 0])
        version = versions.published(number)
        own = on_loop(vllm.answer(*version, Logprob(), sequences, [0, 0, 0]))
        ids = on_loop(vllm.answer(*version, TopK(5), sequences, [0, 0, 0]))
        for each, read, exact in zip(written, own, expected, strict=True):
            np.testing.assert_allclose(each.logprobs, exact, atol=1e-3)
            np.testing.assert_allclose(read, exact, atol=1e-3)
        assert np.mean(np.concatenate(ids) == np.concatenate(likeliest)) > 0.99  # near-equal ones may swap places
        assert all(each.dtype == np.int32 and each.max() < VOCABULARY for each in ids)
        assert texts(on_loop(write(vllm, versions, number, parameters=replace(PARAMETERS, temperature=0.0)))) == texts(
            greedy
        )
        seen.append(texts(written))
    assert seen[0] == seen[2]
    assert seen[0] != seen[1] != seen[3] != seen[0]
    wide = on_loop(vllm.answer(*versions.published(0), TopK(1000), sequences, [0, 0, 0]))
    assert wide[0].shape[1] == VOCABULARY


def test_concurrent_versions_do_not_mix(vllm, versions, on_loop):
    alone = {number: on_loop(write(vllm, versions, number)) for number in (1, 2)}

    async def together():
        return await asyncio.gather(*(write(vllm, versions, 1 + turn % 2) for turn in range(6)))

    for turn, written in enumerate(on_loop(together())):
        assert texts(written) == texts(alone[1 + turn % 2])
        for one, other in zip(written, alone[1 + turn % 2], strict=True):
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_damaged_weights_are_not_used(vllm, versions, on_loop):
    version, published = versions.published(3)
    torn = PublishedWeights(published.checksum ^ 1, published.weights)
    with pytest.raises(UnusableWeights, match="weights of version 3 were damaged"):
        on_loop(vllm.answer(version, torn, PARAMETERS, [(PROMPTS[0], 0)], [0]))
    on_loop(vllm.check_health())
    assert texts(on_loop(write(vllm, versions, 3))) != texts(on_loop(write(vllm, versions, 2)))


def test_cancellation_during_a_weight_update_is_harmless(vllm, versions, on_loop):
    expected = [texts(on_loop(write(vllm, versions, number))) for number in (1, 2)]

    async def leave():
        leaving = asyncio.create_task(write(vllm, versions, 1))
        while vllm._lock._version is not None:
            await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        return [texts(await write(vllm, versions, number)) for number in (1, 2)]

    assert on_loop(leave()) == expected


def test_version_lock_keeps_the_order_of_requests():
    """VersionLock by themselves: what runs, and when, is seen better without an engine."""
    events = []

    async def change(version, _):
        events.append(f"become {version.number}")

    async def main():
        lock, done = VersionLock(change), [asyncio.Event() for _ in range(4)]

        async def request(name, number):
            async with lock.hold(WeightVersion("attempt", number), None):
                events.append(f"begin {name}")
                await done[name].wait()

        tasks = []
        for name, number in enumerate((1, 1, 2, 1)):
            tasks.append(asyncio.create_task(request(name, number)))
            await asyncio.sleep(0.01)
        assert events == ["become 1", "begin 0", "begin 1"]
        done[0].set()
        await asyncio.sleep(0.01)
        assert len(events) == 3
        done[1].set()
        await asyncio.sleep(0.01)
        assert events[3:] == ["become 2", "begin 2"]
        tasks[2].cancel()
        await asyncio.sleep(0.01)
        assert events[5:] == ["become 1", "begin 3"]
        done[3].set()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())


def test_killed_engine_process_fails_requests_and_the_health_check(vllm, versions, on_loop):
    async def main():
        await vllm.check_health()
        asking = asyncio.create_task(write(vllm, versions, 1, parameters=replace(PARAMETERS, max_new_tokens=400)))
        while not vllm._engine._engine.get_num_unfinished_requests():
            await asyncio.sleep(0.001)
        for process in psutil.Process().children():
            if "EngineCore" in process.name():
                process.kill()
        with pytest.raises(EngineDied):
            await asyncio.wait_for(asking, 30)
        with pytest.raises(EngineDied):
            await vllm.check_health()
        with pytest.raises(EngineDied):
            await write(vllm, versions, 2)

    on_loop(main())


def test_adapter_is_merged_for_vllm(tmp_path):
    tiny_model(tmp_path / "base", seed=3, tokenizer=tiny_tokenizer())
    config = StudentConfig(model=str(tmp_path / "base"), lora={"r": 4})
    adapted = perturb(make_model(config, tiny_tokenizer(), 0)).eval()
    plain = load_model(str(tmp_path / "base"))
    weights = full_state_dict(PolicyModel(adapted, tiny_tokenizer()))
    width = weights["lm_head.weight"].shape[0]
    assert width < plain.lm_head.weight.shape[0]  # rows that are no tokens do not travel
    state = plain.state_dict()
    assert weights.keys() == state.keys()
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        weights[name] = torch.cat([weights[name], state[name][width:]])
    plain.load_state_dict(weights)
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, adapted(ids).logits, atol=1e-5, rtol=0)
        assert (plain(ids).logits - load_model(str(tmp_path / "base"))(ids).logits).abs().max() > 1e-3
