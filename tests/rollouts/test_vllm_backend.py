"""A policy's replica with vLLM on the CPU; all tests share one engine with two tensor-parallel parts. The last engine
test kills it."""

import asyncio
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch

from rayk.config import StudentConfig, VLLMPolicyEngineConfig
from rayk.config.support import Hidden, Logprob, Requested, Sampled, TopK
from rayk.engines.base import SamplingParameters
from rayk.engines.transformers import TransformersEngine
from rayk.errors import EngineDied
from rayk.models import load_model, real_vocab_size
from rayk.models.student import make_model
from rayk.rollouts.policy_model import PolicyModel
from rayk.rollouts.vllm_backend import VersionLock, full_state_dict, start_vllm
from rayk.serving.weight_store import PublishedWeights, UnusableWeights, WeightVersion
from rayk.serving.weights import checksum, pack_weights
from rayk.signals.sequence import TokenSequence
from tests.engines.reference import assert_equal_signals, sequence, with_requested_ids
from tests.rollouts.test_policy import VOCABULARY
from tests.tiny import perturb, tiny_model, tiny_tokenizer

PARAMETERS = SamplingParameters(max_new_tokens=16)
PROMPTS = [np.arange(4, 4 + length, dtype=np.int32) for length in (3, 20, 9)]


class LocalWeights:
    """Weights in this process instead of Ray's object store."""

    def __init__(self, weights):
        self._weights = weights

    def __await__(self):
        yield from ()
        return self._weights


class Versions:
    """The student during training: its model after a number of steps, and the published weights."""

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
        return WeightVersion("attempt", number), PublishedWeights(checksum(weights), LocalWeights(weights))

    def policy_model(self, number):
        return PolicyModel(self.model(number), tiny_tokenizer())


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    """Versions of a student with a tied head, padded with rows that would be likely tokens."""
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
    # From an architecture, without a folder of the student; the integration test starts from a folder.
    architecture = load_model(versions._folder).config.to_dict() | {"architectures": None}
    student = StudentConfig(config=architecture, tokenizer=versions._folder)
    engine = VLLMPolicyEngineConfig(tensor_parallel_size=2, arguments={"enforce_eager": True})
    model, folder = versions.policy_model(0), versions._folder
    started = on_loop(start_vllm(model, student, engine, tokenizer=folder, precision="float32"))
    yield started
    started._engine.close()


async def generate(vllm, versions, number, seed=0, parameters=PARAMETERS):
    items = [(prompt, seed + i) for i, prompt in enumerate(PROMPTS)]
    return await vllm.answer(*versions.published(number), parameters, items, [0] * len(items))


def token_ids(generated):
    return [each.token_ids.tolist() for each in generated]


def sequences_of(generated):
    return [
        TokenSequence(
            np.concatenate([prompt, each.token_ids]), np.arange(len(prompt) + len(each.token_ids)) >= len(prompt)
        )
        for prompt, each in zip(PROMPTS, generated, strict=True)
    ]


def test_each_version_generates_and_scores_with_its_weights(vllm, versions, on_loop):
    seen = []
    for number in (1, 2, 1, 0):
        generated, again = (on_loop(generate(vllm, versions, number)) for _ in range(2))
        assert token_ids(generated) == token_ids(again)
        sequences = sequences_of(generated)
        reference = versions.policy_model(number)
        with reference.inference_context():
            expected = reference.logprobs(sequences)
            likeliest = reference.top_ids(sequences, 5)
            greedy = reference.generate(PROMPTS, replace(PARAMETERS, temperature=0.0), [0, 0, 0])
        version = versions.published(number)
        own = on_loop(vllm.answer(*version, Logprob(), sequences, [0, 0, 0]))
        ids = on_loop(vllm.answer(*version, TopK(5), sequences, [0, 0, 0]))
        for each, read, exact in zip(generated, own, expected, strict=True):
            np.testing.assert_allclose(each.logprobs, exact, atol=1e-3)
            np.testing.assert_allclose(read, exact, atol=1e-3)
        assert np.mean(np.concatenate(ids) == np.concatenate(likeliest)) > 0.99  # almost equal ones may swap places
        assert all(each.dtype == np.int32 and each.max() < VOCABULARY for each in ids)
        assert token_ids(
            on_loop(generate(vllm, versions, number, parameters=replace(PARAMETERS, temperature=0.0)))
        ) == token_ids(greedy)
        seen.append(token_ids(generated))
    assert seen[0] == seen[2]
    assert seen[0] != seen[1] != seen[3] != seen[0]
    wide = on_loop(vllm.answer(*versions.published(0), TopK(1000), sequences, [0, 0, 0]))
    assert wide[0].shape[1] == VOCABULARY


@pytest.mark.parametrize(
    "support", [TopK(16, (1.0, 2.0)), Requested(4), Sampled(20), Logprob(), Hidden("float32")], ids=str
)
def test_signals_of_a_head_in_two_parts_equal_those_of_the_whole_one(vllm, versions, on_loop, support, tmp_path):
    versions.model(1).save_pretrained(tmp_path)
    tiny_tokenizer(tmp_path)
    on_loop(generate(vllm, versions, 1))  # loads the version
    sequences = [sequence(length, length) for length in (40, 3, 120)]
    sequences = with_requested_ids(sequences, 6) if isinstance(support, Requested) else sequences
    whole = TransformersEngine(str(tmp_path))
    # The policy's embedding has no padding, which counts in the normalizer.
    whole._head = whole._head.truncate(VOCABULARY)
    assert_equal_signals(*(on_loop(engine.score(sequences, support)) for engine in (vllm._engine, whole)))


def test_trained_ends_end_completions(vllm, versions, on_loop, monkeypatch):
    free = token_ids(on_loop(generate(vllm, versions, 0)))
    end = free[0][2]
    monkeypatch.setattr(vllm._model.model.generation_config, "eos_token_id", [1, end])
    ended = on_loop(generate(vllm, versions, 0))
    assert ended[0].finish_reason == "stop"
    assert token_ids(ended) == [ids[: ids.index(end) + 1] if end in ids else ids for ids in free]


def test_concurrent_versions_do_not_mix(vllm, versions, on_loop):
    separate = {number: on_loop(generate(vllm, versions, number)) for number in (1, 2)}

    async def together():
        return await asyncio.gather(*(generate(vllm, versions, 1 + turn % 2) for turn in range(6)))

    for turn, generated in enumerate(on_loop(together())):
        assert token_ids(generated) == token_ids(separate[1 + turn % 2])
        for one, other in zip(generated, separate[1 + turn % 2], strict=True):
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_damaged_weights_are_not_used(vllm, versions, on_loop):
    version, published = versions.published(3)
    torn = PublishedWeights(published.checksum ^ 1, published.weights)
    with pytest.raises(UnusableWeights, match="weights of version 3 were damaged"):
        on_loop(vllm.answer(version, torn, PARAMETERS, [(PROMPTS[0], 0)], [0]))
    on_loop(vllm.check_health())
    assert token_ids(on_loop(generate(vllm, versions, 3))) != token_ids(on_loop(generate(vllm, versions, 2)))


def test_cancellation_during_a_weight_update_is_harmless(vllm, versions, on_loop):
    expected = [token_ids(on_loop(generate(vllm, versions, number))) for number in (1, 2)]

    async def cancel():
        task = asyncio.create_task(generate(vllm, versions, 1))
        while vllm._lock._version is not None:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return [token_ids(await generate(vllm, versions, number)) for number in (1, 2)]

    assert on_loop(cancel()) == expected


def test_version_lock_keeps_the_order_of_requests():
    """The lock without an engine, to observe the order of events."""
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
        task = asyncio.create_task(generate(vllm, versions, 1, parameters=replace(PARAMETERS, max_new_tokens=400)))
        while not vllm._engine._engine.get_num_unfinished_requests():
            await asyncio.sleep(0.001)
        for process in psutil.Process().children():
            if "EngineCore" in process.name():
                process.kill()
        with pytest.raises(EngineDied):
            await asyncio.wait_for(task, 30)
        with pytest.raises(EngineDied):
            await vllm.check_health()
        with pytest.raises(EngineDied):
            await generate(vllm, versions, 2)

    on_loop(main())


def test_adapter_is_merged_for_vllm(tmp_path):
    tiny_model(tmp_path / "base", seed=3, tokenizer=tiny_tokenizer())
    config = StudentConfig(model=str(tmp_path / "base"), lora={"r": 4})
    adapted = perturb(make_model(config, tiny_tokenizer(), 0)).eval()
    plain = load_model(str(tmp_path / "base"))
    weights = full_state_dict(PolicyModel(adapted, tiny_tokenizer()))
    width = weights["lm_head.weight"].shape[0]
    assert width < plain.lm_head.weight.shape[0]  # rows without a token are not transferred
    state = plain.state_dict()
    assert weights.keys() == state.keys()
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        weights[name] = torch.cat([weights[name], state[name][width:]])
    plain.load_state_dict(weights)
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, adapted(ids).logits, atol=1e-5, rtol=0)
        assert (plain(ids).logits - load_model(str(tmp_path / "base"))(ids).logits).abs().max() > 1e-3
