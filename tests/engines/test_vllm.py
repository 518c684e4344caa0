"""Real vLLM on the CPU, compared with the same model in transformers. The last test stops the engine of the others."""

import asyncio
import signal
import sys

import numpy as np
import psutil
import pytest
import torch
from scipy.stats import chisquare

from rayk.config import VLLMEngineConfig
from rayk.config.support import Hidden, Logprob, Requested, Sampled, TopK
from rayk.engines.base import SamplingParameters
from rayk.engines.transformers import TransformersEngine
from rayk.engines.vllm import VLLMEngine
from rayk.errors import EngineDied, InputError
from rayk.signals.batch import concatenate
from rayk.signals.sequence import TokenSequence
from tests.engines.reference import (
    VOCAB,
    assert_correct,
    assert_equal_signals,
    assert_logprobs_correct,
    dense,
    next_token_logits,
    prompts_of,
    sequence,
    with_requested_ids,
)
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.cluster

SETTINGS = VLLMEngineConfig(dtype="float32", arguments={"enforce_eager": True})


@pytest.fixture(scope="module")
def model():
    """A model whose likeliest token is often padding of the embedding; vLLM's CPU kernels require wide heads."""
    model = tiny_model(seed=1, hidden=128, peaked=2.0)
    with torch.no_grad():
        model.lm_head.weight[VOCAB:] *= 1.1
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "wide"
    model.save_pretrained(path)
    tiny_tokenizer(path)
    return str(path)


@pytest.fixture(scope="module")
def engine(folder, on_loop):
    engine = VLLMEngine(folder, SETTINGS)
    on_loop(engine.warm_up())
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def twin(folder):
    return TransformersEngine(folder)


def generate_with(engine, on_loop, prompts, seed=0, **parameters):
    seeds = [seed + i for i in range(len(prompts))]
    return on_loop(engine.generate(prompts, SamplingParameters(**parameters), seeds))


@pytest.mark.parametrize("k", [1, 7, 64, VOCAB])
def test_top_k_equals_the_dense_log_probs_without_padding(engine, on_loop, model, k):
    sequences = [sequence(length, length) for length in (2, 5, 90, 300)]
    signals = on_loop(engine.score(sequences, TopK(k)))
    assert_correct(signals, model, sequences, atol=1e-3, is_rounded=True)
    assert int(signals.ids.max()) < VOCAB


def test_the_probability_of_padding_is_measured(engine, on_loop, twin, monkeypatch):
    monkeypatch.setattr("rayk.engines.padding._LARGEST_FACTOR", 0.0)
    for one in (engine, twin):
        with pytest.raises(InputError, match=rf"384 rows .* only {VOCAB} tokens.*[1-9][0-9]\.[0-9]% of the prob"):
            on_loop(one.warm_up())


EVERY_SUPPORT = [
    TopK(16, (1.0, 2.0, 0.5)), TopK(VOCAB), Requested(4, (1.0, 2.0)), Requested(0), Sampled(20), Sampled(20, 0.8),
    Logprob(), Hidden("float32"), Hidden(),
]  # fmt: skip


@pytest.mark.parametrize("support", EVERY_SUPPORT, ids=str)
def test_signals_equal_the_transformers_engines(engine, on_loop, twin, support):
    assert_equal_signals(*(on_loop(one.score(requests(support), support)) for one in (engine, twin)))


def requests(support):
    sequences = [sequence(length, length) for length in (40, 3, 120, 1)]
    return with_requested_ids(sequences, 6) if isinstance(support, Requested) else sequences


def test_the_engine_describes_its_model(engine, twin):
    info = engine.info
    assert (info.vocab_size, info.tokenizer_fingerprint) == (twin.info.vocab_size, twin.info.tokenizer_fingerprint)
    assert (info.dtype, info.device, info.hidden_size) == ("float32", "cpu", 128)
    assert info.supports == ("topk", "requested", "sampled", "hidden", "logprob")
    assert (*info.supports, "layers") == twin.info.supports


def test_only_counted_positions_have_signals_and_the_last_token_may_count(engine, on_loop, model):
    flags = np.zeros(20, bool)
    flags[[1, 7, 19]] = True
    one = TokenSequence(sequence(20).input_ids, flags)
    assert_correct(on_loop(engine.score([one], TopK(5))), model, [one], atol=1e-3, is_rounded=True)
    longest = sequence(engine.info.max_tokens, counted=True)
    assert_correct(on_loop(engine.score([longest], Logprob())), model, [longest], atol=1e-3)


@pytest.mark.parametrize("support", [TopK(5), Logprob(), Hidden()])
def test_rows_without_a_counted_token_are_empty_rows(engine, on_loop, support):
    sequences = [sequence(9, 1, counted=False), sequence(12, 2, counted=True), sequence(1, 3)]
    assert on_loop(engine.score(sequences, support)).offsets.tolist() == [0, 0, 11, 11]
    assert on_loop(engine.score(sequences[:1], support)).tokens == 0


def test_hidden_states_and_the_head_reproduce_the_dense_log_probs(engine, on_loop, model):
    sequences = [sequence(length, length) for length in (40, 3, 120)]
    signals = on_loop(engine.score(sequences * 2, Hidden("float32")))  # the second time with a cached prefix
    made = engine.head().logits(signals.hidden).log_softmax(1)
    torch.testing.assert_close(made, dense(model, sequences * 2), atol=1e-3, rtol=0)


def test_prompts_that_are_read_in_parts_and_preempted_have_whole_signals(folder, on_loop, model):
    """A step reads 64 tokens, and the KV cache has room for one of the sequences."""
    arguments = {"enable_chunked_prefill": True, "max_num_batched_tokens": 64, "kv_cache_memory_bytes": 5 << 17}
    engine = VLLMEngine(folder, SETTINGS.model_copy(update={"arguments": SETTINGS.arguments | arguments}))
    sequences = [sequence(length, length) for length in (500, 300, 90, 400, 2, 64, 65)]
    try:
        signals = on_loop(engine.score(sequences, TopK(5)))
    finally:
        engine.close()
    assert_correct(signals, model, sequences, atol=1e-3, is_rounded=True)


def test_concurrent_callers_receive_their_own_results(engine, on_loop):
    groups = [[sequence(10 + 7 * i + j, 10 * i + j) for j in range(3)] for i in range(8)]
    prompts = prompts_of(5, 9)

    async def main():
        scores = [engine.score(group, TopK(8)) for group in groups]
        return await asyncio.gather(*scores, engine.generate(prompts, SamplingParameters(5, 0.0), [0, 0]))

    *together, _ = on_loop(main())
    alone = concatenate([on_loop(engine.score(group, TopK(8))) for group in groups])
    for name in ("offsets", "target_logprobs", "logprobs", "log_tails"):
        torch.testing.assert_close(getattr(concatenate(together), name), getattr(alone, name), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("support", "said"),
    [
        (TopK(VOCAB + 1), f"support.k is {VOCAB + 1}.*vocabulary of {VOCAB}"),
        (Requested(4), "give every sequence 'requested'"),
    ],
)
def test_unsupported_supports_are_refused(engine, on_loop, support, said):
    with pytest.raises(InputError, match=said):
        on_loop(engine.score([sequence(9)], support))


@pytest.mark.parametrize("length", [512, 600])
def test_a_sequence_without_room_for_a_token_is_refused(engine, on_loop, length):
    with pytest.raises(InputError, match=f"sequence of {length} tokens is longer than the limit of .* \\(511\\)"):
        on_loop(engine.score([sequence(length)], TopK(4)))


def test_greedy_generation_equals_the_transformers_engine(engine, on_loop, twin):
    prompts = prompts_of(3, 17, 9)
    ours, theirs = (
        generate_with(each, on_loop, prompts, max_new_tokens=30, temperature=0.0) for each in (engine, twin)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert one.finish_reason == other.finish_reason


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_p": 0.8}, {"top_k": 3}, {"temperature": 0.0}])
def test_generated_logprobs_are_those_at_temperature_one(engine, on_loop, model, sampling):
    prompts = prompts_of(3, 17, 9)
    for prompt, written in zip(
        prompts, generate_with(engine, on_loop, prompts, max_new_tokens=25, **sampling), strict=True
    ):
        assert len(written.logprobs) == len(written.token_ids)
        assert written.token_ids.max() < VOCAB
        assert_logprobs_correct(model, prompt, written)


def test_a_seed_gives_the_same_text_in_any_batch(engine, on_loop):
    prompts = prompts_of(3, 17, 9, 4)
    parameters = {"max_new_tokens": 20, "temperature": 1.3, "top_p": 0.95}
    together = generate_with(engine, on_loop, prompts, seed=2**64 - 8, **parameters)
    for row, prompt in enumerate(prompts):
        [alone] = generate_with(engine, on_loop, [prompt], seed=2**64 - 8 + row, **parameters)
        assert alone.token_ids.tolist() == together[row].token_ids.tolist()
    others = generate_with(engine, on_loop, prompts, seed=70, **parameters)
    assert any(a.token_ids.tolist() != b.token_ids.tolist() for a, b in zip(together, others, strict=True))


@pytest.mark.parametrize("parameters", [{"temperature": 0.7}, {}, {"temperature": 2.0}, {"top_k": 3}, {"top_p": 0.6}])
def test_tokens_are_sampled_from_the_distribution(engine, on_loop, model, parameters):
    [prompt] = prompts_of(6)
    written = generate_with(engine, on_loop, [prompt] * 1_000, max_new_tokens=1, **parameters)
    counts = np.bincount([int(one.token_ids[0]) for one in written], minlength=VOCAB)
    logits = next_token_logits(model, prompt) / parameters.get("temperature", 1.0)
    probabilities, order = logits.softmax(0).sort(descending=True)
    nucleus = 1 + int((probabilities.cumsum(0) < parameters["top_p"]).sum()) if "top_p" in parameters else VOCAB
    size = parameters.get("top_k", nucleus)
    counts, probabilities = counts[order.numpy()], probabilities[:size] / probabilities[:size].sum()
    assert counts[:size].sum() == 1_000
    expected = probabilities.numpy() * 1_000
    often = expected >= 5
    observed = [*counts[:size][often], *([counts[:size][~often].sum()] if not often.all() else [])]
    expected = [*expected[often], *([expected[~often].sum()] if not often.all() else [])]
    assert chisquare(observed, expected).pvalue > 1e-4


def test_eos_ends_a_row_and_is_included(engine, on_loop):
    written = generate_with(engine, on_loop, prompts_of(*range(3, 103)), max_new_tokens=40, temperature=2.0)
    assert {one.finish_reason for one in written} == {"stop", "length"}, "choose another seed"
    for one in written:
        ids = one.token_ids.tolist()
        assert (ids[-1] == 1) == (one.finish_reason == "stop") == (1 in ids)
        assert one.finish_reason == "stop" or len(ids) == 40


def test_given_ends_replace_the_models_own(engine, on_loop):
    prompts, parameters = prompts_of(*range(3, 53)), {"max_new_tokens": 40, "temperature": 2.0}
    free = generate_with(engine, on_loop, prompts, **parameters, end_token_ids=(VOCAB - 1,))
    assert any(1 in one.token_ids for one in free), "choose another seed"
    end = int(free[0].token_ids[5])
    ended = generate_with(engine, on_loop, prompts, **parameters, end_token_ids=(end, VOCAB - 1))
    assert ended[0].finish_reason == "stop"
    for one, whole in zip(ended, free, strict=True):
        ids = whole.token_ids.tolist()
        assert one.token_ids.tolist() == (ids[: ids.index(end) + 1] if end in ids else ids)


def test_a_stop_string_ends_a_row_with_the_token_that_completes_it(engine, on_loop):
    prompts = prompts_of(5, 9, 14, 3)
    free = generate_with(engine, on_loop, prompts, max_new_tokens=30)
    texts = [engine.tokenizer.decode(one.token_ids) for one in free]
    stops = (texts[0][6:9], texts[1][10:12])
    stopped = generate_with(engine, on_loop, prompts, max_new_tokens=30, stop=stops)
    for one, text, before in zip(stopped, texts, free, strict=True):
        assert one.token_ids.tolist() == before.token_ids.tolist()[: len(one.token_ids)]
        assert len(one.logprobs) == len(one.token_ids)
        assert not any(stop in engine.tokenizer.decode(one.token_ids[:-1]) for stop in stops)
        if any(stop in text for stop in stops):
            assert any(stop in engine.tokenizer.decode(one.token_ids) for stop in stops)
            assert one.finish_reason == "stop"
        else:
            assert len(one.token_ids) == len(before.token_ids)
    assert len(stopped[0].token_ids) < len(free[0].token_ids)


@pytest.mark.parametrize("temperature", [0.001, 2.5])
def test_temperatures_outside_vllms_range_are_refused(engine, on_loop, temperature):
    with pytest.raises(InputError, match=f"from 0.01 to 2, or 0 for greedy, not {temperature:g}"):
        generate_with(engine, on_loop, prompts_of(4), temperature=temperature)


def test_nothing_is_computed_for_a_cancelled_caller(engine, on_loop):
    async def main():
        asking = asyncio.create_task(
            engine.generate(prompts_of(*[5] * 20), SamplingParameters(500, 1.0), list(range(20)))
        )
        while not engine._engine.get_num_unfinished_requests():
            await asyncio.sleep(0.001)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert engine._engine.get_num_unfinished_requests() == 0

    on_loop(main())
    on_loop(engine.check_health())
    assert on_loop(engine.score([sequence(9, counted=True)], TopK(2))).tokens == 8


def test_a_missing_vllm_names_the_package_to_install(folder, monkeypatch):
    for name in ("vllm", "vllm.engine.arg_utils"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match="engine kind 'vllm' needs the vllm package: pip install 'rayk\\[vllm\\]'"):
        VLLMEngine(folder, SETTINGS)


@pytest.mark.parametrize("wrong", [{"arguments": {"no_such_argument": 1}}, {"max_model_len": 1_000_000}])
def test_settings_that_vllm_rejects_are_named(folder, wrong):
    named = str(next(iter(wrong.get("arguments", wrong))))
    with pytest.raises(InputError, match=f"vLLM does not start .*{named}"):
        VLLMEngine(folder, SETTINGS.model_copy(update=wrong))


def test_a_hung_process_is_killed_and_fails_requests_and_the_health_check(engine, on_loop, monkeypatch):
    async def main():
        for _ in range(2):
            await engine.check_health()
            await asyncio.wait_for(engine._ping, 60)
        asking = asyncio.create_task(engine.generate(prompts_of(5), SamplingParameters(500, 1.0), [0]))
        while not engine._engine.get_num_unfinished_requests():
            await asyncio.sleep(0.001)
        for process in psutil.Process().children():
            if "EngineCore" in process.name():
                process.send_signal(signal.SIGSTOP)
        await engine.check_health()
        monkeypatch.setattr(engine, "_stall_seconds", 0.5)
        await asyncio.sleep(1)
        with pytest.raises(EngineDied, match="have not reacted for"):
            await engine.check_health()
        with pytest.raises(EngineDied, match="process .* has ended"):
            await asyncio.wait_for(asking, 30)
        with pytest.raises(EngineDied, match="has ended"):
            await engine.check_health()

    on_loop(main())
