"""Scores and completions of real models: equal to transformers' own, in every engine."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayk.config import TransformersEngineConfig, VLLMEngineConfig
from rayk.config.support import Hidden, Logprob, TopK
from rayk.data.text_encoder import TextEncoder
from rayk.engines.base import SamplingParameters
from rayk.engines.transformers import TransformersEngine
from rayk.signals.sequence import TokenSequence

TEXT = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or "
    "twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, “and "
    "what is the use of a book,” thought Alice “without pictures or conversations?” So she was considering in her own "
    "mind, as well as she could, for the hot day made her feel very sleepy and stupid, whether the pleasure of making "
    "a daisy-chain would be worth the trouble of getting up and picking the daisies, when suddenly a White Rabbit with "
    "pink eyes ran close by her."
)
NATS_PER_TOKEN = {"smollm2": 3.615, "gemma3": 3.431}
"""Mean negative log-prob of `TEXT`, from the second token on."""


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name, request):
    return request.getfixturevalue(name)


@pytest.fixture(scope="module")
def sequence(folder):
    ids = np.array(AutoTokenizer.from_pretrained(folder)(TEXT).input_ids, dtype=np.int32)
    return TokenSequence(ids, np.arange(len(ids)) > 0)


@pytest.fixture(scope="module")
def logprobs(folder, sequence):
    """Log-probs of transformers at the counted tokens, float32 [tokens, vocab]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.from_numpy(sequence.input_ids.astype(np.int64))[None]).logits[0, :-1]
    return logits.log_softmax(-1)


@pytest.fixture(scope="module")
def engine(folder):
    return TransformersEngine(folder, TransformersEngineConfig(dtype="float32"))


def test_a_model_knows_english(name, logprobs, sequence):
    targets = torch.from_numpy(sequence.input_ids[1:].astype(np.int64))
    assert -logprobs.gather(1, targets[:, None]).mean() == pytest.approx(NATS_PER_TOKEN[name], abs=0.02)


def test_signals_equal_transformers(engine, logprobs, sequence, on_loop):
    targets = torch.from_numpy(sequence.input_ids[1:].astype(np.int64))
    exact = logprobs.gather(1, targets[:, None])[:, 0]
    top = on_loop(engine.score([sequence], TopK(16)))
    expected = logprobs.topk(16)
    assert torch.equal(top.ids.long(), expected.indices)
    assert torch.allclose(top.logprobs.float(), expected.values, atol=2e-3)  # stored in float16
    for support in (TopK(16), Logprob()):
        assert torch.allclose(on_loop(engine.score([sequence], support)).target_logprobs, exact, atol=1e-3)
    hidden = on_loop(engine.score([sequence], Hidden())).hidden
    from_hidden = engine.head().logits(hidden.float()).log_softmax(-1)  # hidden states travel in 16 bits
    assert (logprobs.exp() * (logprobs - from_hidden)).sum(-1).abs().max() < 1e-4


def test_a_greedy_answer_ends_and_is_right(smollm2, on_loop):
    engine = TransformersEngine(smollm2, TransformersEngineConfig(dtype="float32"))
    question = {"role": "user", "content": "What is the capital of France?"}
    prompt = np.array(TextEncoder(engine.tokenizer).chat_prompt([question], "test"), np.int32)
    parameters = SamplingParameters(max_new_tokens=40, temperature=0.0)
    (answer,) = on_loop(engine.generate([prompt], parameters, [0]))
    assert (answer.text, answer.finish_reason) == ("The capital of France is Paris.", "stop")


@pytest.mark.cluster
def test_vllm_scores_and_generates_as_transformers(smollm2, on_loop):
    from rayk.engines.vllm import VLLMEngine

    ids = np.array(AutoTokenizer.from_pretrained(smollm2)(TEXT).input_ids, dtype=np.int32)
    text, parameters = (
        TokenSequence(ids, np.arange(len(ids)) > 0),
        SamplingParameters(max_new_tokens=16, temperature=0.0),
    )
    twin = TransformersEngine(smollm2, TransformersEngineConfig(dtype="float32"))
    expected = on_loop(twin.score([text], TopK(16)))
    (expected_text,) = on_loop(twin.generate([ids[:40]], parameters, [0]))
    engine = VLLMEngine(smollm2, VLLMEngineConfig(dtype="float32", arguments={"enforce_eager": True}))
    try:
        on_loop(engine.warm_up())
        signals = on_loop(engine.score([text], TopK(16)))
        (generated,) = on_loop(engine.generate([ids[:40]], parameters, [0]))
    finally:
        engine.close()
    assert torch.allclose(signals.target_logprobs, expected.target_logprobs, atol=5e-3)
    assert (signals.ids == expected.ids).float().mean() > 0.99
    assert generated.text == expected_text.text
