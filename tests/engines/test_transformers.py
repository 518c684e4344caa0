import asyncio
import itertools
import json
import math
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, GenerationConfig

from rayk import losses
from rayk.config import TransformersEngineConfig
from rayk.config.support import Logprob, TopK
from rayk.engines import reduce
from rayk.engines.base import SamplingParameters
from rayk.engines.generation import generate
from rayk.engines.transformers import TransformersEngine
from rayk.errors import InputError
from rayk.models import tokenizer_fingerprint
from rayk.models.body import get_body
from rayk.signals.sequence import TokenSequence
from tests.engines.reference import (
    VOCAB,
    assert_correct,
    assert_logprobs_correct,
    dense,
    next_token_logits,
    prompts_of,
    sequence,
)
from tests.tiny import EOS, tiny_model, tiny_tokenizer


def score(engine, sequences, support):
    return asyncio.run(engine.score(sequences, support))


LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=9)


@given(lengths=LENGTHS, k=st.sampled_from([1, 7, 64]), calls=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_signals_equal_the_dense_logits_in_any_batch(engine, reference, lengths, k, calls, seed):
    """For all combinations of lengths and callers that share a batch."""
    sequences = [sequence(length, seed + i) for i, length in enumerate(lengths)]
    engine._batcher._budget = [64, 200, 8192][seed % 3]
    groups = [group for group in (sequences[i::calls] for i in range(calls)) if group]

    async def main():
        return await asyncio.gather(*(engine.score(group, TopK(k, (1.0, 2.0))) for group in groups))

    for group, signals in zip(groups, asyncio.run(main()), strict=True):
        if any(one.counted_tokens for one in group):
            assert_correct(signals, reference, group)
        else:
            assert signals.tokens == 0


def test_only_counted_positions_have_signals_and_the_last_token_may_count(engine, reference):
    flags = np.zeros(20, bool)
    flags[[1, 7, 19]] = True
    one = TokenSequence(sequence(20).input_ids, flags)
    signals = score(engine, [one], TopK(5))
    assert signals.tokens == 3
    assert_correct(signals, reference, [one])


def test_rows_without_a_counted_token_are_empty_rows(engine, reference):
    sequences = [sequence(9, 1, counted=False), sequence(12, 2, counted=True), sequence(5, 3, counted=False)]
    assert score(engine, sequences, TopK(5)).offsets.tolist() == [0, 0, 11, 11]
    assert_correct(score(engine, sequences, TopK(5)), reference, sequences)
    nothing = score(engine, sequences[:1], TopK(5))
    assert (len(nothing), nothing.tokens, nothing.ids.shape) == (1, 0, (0, 5))


def test_logprob_support_contains_only_the_actual_tokens(engine, reference):
    sequences = [sequence(30, i) for i in range(3)]
    signals = score(engine, sequences, Logprob())
    assert signals.ids is None
    assert_correct(signals, reference, sequences)


def test_k_may_be_the_whole_vocabulary(engine, reference, tmp_path):
    sequences = [sequence(10, counted=True)]
    support = TopK(VOCAB, (1.0, 2.0))
    assert_correct(
        score(engine, sequences, support), reference, sequences
    )  # the tail consists of the embedding's padding
    model = tiny_model(tmp_path, vocab_size=VOCAB, peaked=4.0, tokenizer=tiny_tokenizer())
    signals = score(TransformersEngine(str(tmp_path)), sequences, support)
    assert bool(signals.log_tails.isneginf().all())
    torch.testing.assert_close(signals.logprobs, dense(model, sequences).gather(1, signals.ids), atol=1e-4, rtol=0)


def test_equal_models_have_zero_divergence_with_a_padded_embedding(engine, reference):
    sequences = [sequence(30, counted=True)]
    log_q = dense(reference, sequences)
    for support in (TopK(16, (1.0, 2.0)), TopK(VOCAB, (1.0, 2.0))):
        signals = score(engine, sequences, support)
        for temperature in support.temperatures:
            assert losses.forward_kl(log_q, signals, temperature=temperature).abs().max() < 1e-5


@pytest.mark.parametrize("temperature", [0.5, 2.0, 4.0])
def test_signals_at_a_temperature_equal_the_dense_softmax(engine, reference, temperature):
    sequences = [sequence(40, counted=True)]
    signals = score(engine, sequences, TopK(16, (1.0, temperature)))
    log_p, log_tail = signals.at_temperature(temperature)
    exact = (dense(reference, sequences).double() / temperature).log_softmax(1)
    torch.testing.assert_close(log_p.double(), exact.gather(1, signals.ids), atol=1e-4, rtol=0)
    rest = exact.scatter(1, signals.ids, float("-inf")).logsumexp(1)
    torch.testing.assert_close(log_tail.double(), rest, atol=1e-4, rtol=0)


def test_chunks_of_the_head_do_not_change_the_signals(engine, monkeypatch):
    sequences = [sequence(50, i, counted=True) for i in range(3)]
    whole = score(engine, sequences, TopK(8, (1.0, 2.0)))
    monkeypatch.setattr(reduce, "LOGITS_BYTES", {"cpu": 1})  # chunks of 16 positions
    chunked = score(engine, sequences, TopK(8, (1.0, 2.0)))
    for name in ("offsets", "target_logprobs", "logprobs", "log_tails"):
        torch.testing.assert_close(getattr(chunked, name), getattr(whole, name), atol=1e-5, rtol=1e-5)


def test_bfloat16_is_close(tiny_teacher, reference):
    sequences = [sequence(40, i, counted=True) for i in range(3)]
    signals = score(TransformersEngine(tiny_teacher, TransformersEngineConfig(dtype="bfloat16")), sequences, TopK(64))
    exact = dense(reference, sequences)
    log_p, log_tail = signals.at_temperature()
    inside = exact.gather(1, signals.ids)
    forward = (inside.exp() * (inside - log_p)).sum(1)
    rest = exact.scatter(1, signals.ids, float("-inf")).logsumexp(1)
    forward += rest.exp() * (rest - log_tail)
    assert forward.mean() < 0.02


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "granite", "cohere"])
def test_other_architectures_score_and_generate(tmp_path, architecture):
    model = tiny_model(tmp_path, architecture=architecture, peaked=4.0, tokenizer=tiny_tokenizer())
    engine = TransformersEngine(str(tmp_path))
    sequences = [sequence(length, length) for length in (5, 30, 12)]
    assert_correct(score(engine, sequences, TopK(16)), model, sequences)
    prompts = [one.input_ids for one in sequences]
    for prompt, written in zip(prompts, run(engine, prompts, max_new_tokens=8, temperature=0.0), strict=True):
        assert_logprobs_correct(model, prompt, written)


def test_signals_may_be_used_with_autograd(engine):
    """The engine computes in inference mode, whose tensors autograd rejects."""
    signals = score(engine, [sequence(10, counted=True)], TopK(4))
    weight = torch.ones(4, requires_grad=True)
    (signals.logprobs * weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize(
    ("sequences", "support", "said"),
    [
        ([sequence(5)], TopK(VOCAB + 1), f"support.k is {VOCAB + 1}.*vocabulary of {VOCAB}"),
        ([sequence(5), sequence(513)], TopK(4), "513 tokens is longer than the limit of .* \\(512\\)"),
        (
            [TokenSequence(np.array([1, VOCAB], np.int32), np.array([False, True]))],
            TopK(4),
            f"Token id {VOCAB} is outside",
        ),
        ([TokenSequence(np.array([1, -100], np.int32), np.array([False, True]))], TopK(4), "Token id -100 is outside"),
    ],
)
def test_invalid_scoring_requests_are_refused(engine, sequences, support, said):
    with pytest.raises(InputError, match=said):
        score(engine, sequences, support)


def test_the_longest_sequence_is_scored(engine):
    assert score(engine, [sequence(512, counted=True)], TopK(4)).tokens == 511


def test_info_contains_the_real_vocabulary_size(tmp_path):
    tiny_model(tmp_path, vocab_size=400, tokenizer=tiny_tokenizer())
    engine = TransformersEngine(str(tmp_path))
    assert (engine.info.vocab_size, engine.info.max_tokens, engine.info.dtype) == (VOCAB, 512, "float32")
    assert engine.info.tokenizer_fingerprint == tokenizer_fingerprint(tiny_tokenizer())
    assert engine.info.tokenizer_fingerprint != tokenizer_fingerprint(tiny_tokenizer(sentences=("x y",)))


def test_a_fresh_engine_warms_up_and_is_healthy(engine):
    asyncio.run(engine.warm_up())
    asyncio.run(engine.check_health())


# Generation


def run(engine, prompts, seed=0, **parameters):
    seeds = [seed + i for i in range(len(prompts))]
    return asyncio.run(engine.generate(prompts, SamplingParameters(**parameters), seeds))


def test_greedy_generation_equals_transformers(engine, tiny_teacher):
    unpadded = AutoModelForCausalLM.from_pretrained(tiny_teacher).eval()
    unpadded.resize_token_embeddings(VOCAB)
    prompts = prompts_of(3, 17, 9)
    for prompt, written in zip(prompts, run(engine, prompts, max_new_tokens=30, temperature=0.0), strict=True):
        own = GenerationConfig(max_new_tokens=30, do_sample=False, eos_token_id=1, pad_token_id=0)
        expected = unpadded.generate(torch.from_numpy(prompt.astype(np.int64))[None], generation_config=own)
        assert written.token_ids.tolist() == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_p": 0.8}, {"top_k": 3}, {"temperature": 0.0}])
def test_generated_logprobs_are_those_at_temperature_one(engine, reference, sampling):
    prompts = prompts_of(3, 17, 9)
    for prompt, written in zip(prompts, run(engine, prompts, max_new_tokens=25, **sampling), strict=True):
        assert len(written.logprobs) == len(written.token_ids)
        assert_logprobs_correct(reference, prompt, written)


def test_a_seed_gives_the_same_text_in_any_batch(engine):
    prompts = prompts_of(3, 17, 9, 4)
    parameters = {"max_new_tokens": 20, "temperature": 1.3, "top_p": 0.95}
    together = run(engine, prompts, seed=7, **parameters)
    assert [w.token_ids.tolist() for w in run(engine, prompts, seed=7, **parameters)] == [
        w.token_ids.tolist() for w in together
    ]
    for row, prompt in enumerate(prompts):
        [alone] = run(engine, [prompt], seed=7 + row, **parameters)
        assert alone.token_ids.tolist() == together[row].token_ids.tolist()
    others = run(engine, prompts, seed=70, **parameters)
    assert any(a.token_ids.tolist() != b.token_ids.tolist() for a, b in zip(together, others, strict=True))


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_p": 0.8}, {"stop": ("e",)}])
def test_both_loops_generate_the_same(engine, monkeypatch, sampling):
    """Rows that have ended leave one loop's batch; transformers' loop keeps them."""
    prompts = prompts_of(3, 17, 9, 4, 30, 12)
    ours = run(engine, prompts, max_new_tokens=25, **sampling)
    monkeypatch.setattr("rayk.engines.generation.can_continue", lambda model: False)
    theirs = run(engine, prompts, max_new_tokens=25, **sampling)
    for one, other in zip(ours, theirs, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert (one.finish_reason, one.text) == (other.finish_reason, other.text)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
    assert len({len(one.token_ids) for one in ours}) > 1 or not sampling.get("stop"), "choose another stop string"


@pytest.mark.parametrize("rows_leave", [True, False])
def test_cancelled_rows_end_at_the_next_token(tiny_teacher, monkeypatch, rows_leave):
    monkeypatch.setattr("rayk.engines.generation.can_continue", lambda model: rows_leave)
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher).eval()
    calls = itertools.count(1)
    parameters = SamplingParameters(max_new_tokens=20, end_token_ids=(VOCAB - 1,))
    generated = generate(model, VOCAB, tiny_tokenizer(), prompts_of(3, 9), parameters, [0, 1], lambda: next(calls) == 3)
    assert [(len(one.token_ids), one.finish_reason) for one in generated] == [(3, "length")] * 2


def sampled_counts(engine, draws, **parameters):
    [prompt] = prompts_of(6)
    written = run(engine, [prompt] * draws, max_new_tokens=1, **parameters)
    return prompt, np.bincount([int(w.token_ids[0]) for w in written], minlength=VOCAB)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_tokens_are_sampled_from_the_distribution(engine, reference, temperature):
    prompt, counts = sampled_counts(engine, 3_000, temperature=temperature)
    expected = (next_token_logits(reference, prompt) / temperature).softmax(0).numpy() * 3_000
    often = expected >= 5
    observed = [*counts[often], counts[~often].sum()]
    assert chisquare(observed, [*expected[often], expected[~often].sum()]).pvalue > 1e-4


@pytest.mark.parametrize("parameters", [{"top_k": 3}, {"top_p": 0.6}])
def test_truncated_sampling_follows_the_truncated_distribution(engine, reference, parameters):
    prompt, counts = sampled_counts(engine, 1_000, **parameters)
    probabilities, order = next_token_logits(reference, prompt).softmax(0).sort(descending=True)
    size = parameters.get("top_k") or 1 + int((probabilities.cumsum(0) < parameters["top_p"]).sum())
    nucleus = order[:size].numpy()
    assert counts[nucleus].sum() == 1_000
    expected = (probabilities[:size] / probabilities[:size].sum()).numpy() * 1_000
    assert chisquare(counts[nucleus], expected).pvalue > 1e-4


@pytest.fixture(scope="module")
def ending_engine(tmp_path_factory):
    """An engine whose tokens are about equally likely, except EOS, which has a probability of about 1/8."""
    folder = tmp_path_factory.mktemp("ending")
    model = tiny_model(architecture="gpt2", tokenizer=tiny_tokenizer())
    with torch.no_grad():
        model.transformer.ln_f.bias += 1.0
        model.lm_head.weight.mul_(0.01)
        model.lm_head.weight[1] = math.log(VOCAB / 8) / 32
    model.save_pretrained(folder)
    tiny_tokenizer(folder)
    return TransformersEngine(str(folder))


def test_eos_ends_a_row_and_is_included(ending_engine):
    written = run(ending_engine, prompts_of(*range(3, 43)), max_new_tokens=12)
    reasons = {w.finish_reason for w in written}
    assert reasons == {"stop", "length"}, "choose another seed"
    for one in written:
        ids = one.token_ids.tolist()
        assert ids.count(1) == (one.finish_reason == "stop")
        assert (ids[-1] == 1) == (one.finish_reason == "stop")
        assert len(ids) <= 12
        assert one.finish_reason == "stop" or len(ids) == 12
        assert len(one.logprobs) == len(ids)


def test_a_stop_string_ends_a_row_with_the_token_that_completes_it(engine):
    prompts = prompts_of(5, 9, 14, 3)
    free = run(engine, prompts, max_new_tokens=30)
    texts = [engine.tokenizer.decode(w.token_ids) for w in free]
    stops = (texts[0][6:9], texts[1][10:12])
    for one, text, before in zip(run(engine, prompts, max_new_tokens=30, stop=stops), texts, free, strict=True):
        ids = before.token_ids.tolist()
        assert one.token_ids.tolist() == ids[: len(one.token_ids)]
        shorter = engine.tokenizer.decode(one.token_ids[:-1])
        assert not any(stop in shorter for stop in stops)
        if any(stop in text for stop in stops):
            assert any(stop in engine.tokenizer.decode(one.token_ids) for stop in stops)
            assert one.finish_reason == "stop"
        else:
            assert len(one.token_ids) == len(ids)
    assert len(run(engine, prompts[:1], max_new_tokens=30, stop=stops)[0].token_ids) < len(free[0].token_ids)


def test_a_stop_string_that_begins_in_the_prompt_does_not_end_a_row(engine):
    [prompt] = prompts_of(5)
    [free] = run(engine, [prompt], max_new_tokens=10)
    across = engine.tokenizer.decode(prompt)[-1] + engine.tokenizer.decode(free.token_ids[:1])[0]
    assert across not in engine.tokenizer.decode(free.token_ids), "choose another seed"
    [stopped] = run(engine, [prompt], max_new_tokens=10, stop=(across,))
    assert stopped.token_ids.tolist() == free.token_ids.tolist()
    assert stopped.finish_reason == free.finish_reason


def test_the_models_generation_settings_are_ignored_except_eos(tiny_teacher, tmp_path):
    """Hub models have sampling settings in generation_config.json, which must not change a teacher's distribution."""
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    tokenizer = tiny_tokenizer()
    prompts, parameters = prompts_of(5, 9), SamplingParameters(max_new_tokens=20)
    plain = generate(model, VOCAB, tokenizer, prompts, parameters, [1, 2])
    own = GenerationConfig(
        repetition_penalty=5.0, no_repeat_ngram_size=1, suppress_tokens=[int(plain[0].token_ids[0])], min_new_tokens=19,
        begin_suppress_tokens=[int(plain[1].token_ids[0])], forced_eos_token_id=7, temperature=0.1, top_k=1, top_p=0.1,
        typical_p=0.1, do_sample=True, bad_words_ids=[[int(plain[0].token_ids[1])]], max_length=8, eos_token_id=1,
        exponential_decay_length_penalty=(1, 2.0), num_beams=3, epsilon_cutoff=0.1,
    )  # fmt: skip
    model.generation_config = own
    ignored = generate(model, VOCAB, tokenizer, prompts, parameters, [1, 2])
    assert [w.token_ids.tolist() for w in ignored] == [w.token_ids.tolist() for w in plain]
    for a, b in zip(ignored, plain, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
    assert model.generation_config is own
    own.eos_token_id = [1, int(plain[0].token_ids[2])]
    ended = generate(model, VOCAB, tokenizer, prompts, parameters, [1, 2])[0]
    assert len(ended.token_ids) <= 3
    assert ended.finish_reason == "stop"


def test_a_model_without_generation_settings_ends_at_the_tokenizers_eos(ending_engine):
    model = ending_engine.model
    model.generation_config.eos_token_id = None
    written = run(ending_engine, prompts_of(*range(3, 23)), max_new_tokens=12)
    assert "stop" in {w.finish_reason for w in written}
    assert ending_engine.tokenizer.decode(1) == EOS


def test_padding_ids_are_never_sampled(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[VOCAB:] = model.lm_head.weight[: 384 - VOCAB] * 5  # padding rows with the highest logits
    model.save_pretrained(tmp_path)
    tiny_tokenizer(tmp_path)
    engine = TransformersEngine(str(tmp_path))
    for temperature in (0.0, 1.0):
        for prompt, one in zip(
            prompts_of(4, 8), run(engine, prompts_of(4, 8), max_new_tokens=40, temperature=temperature), strict=True
        ):
            assert one.token_ids.max() < VOCAB
            assert_logprobs_correct(model, prompt, one)
    sequences = [sequence(20, counted=True)]
    signals = score(engine, sequences, TopK(VOCAB))
    assert int(signals.ids.max()) < VOCAB
    assert_correct(signals, model, sequences)


@pytest.mark.parametrize(
    ("prompt", "parameters", "said"),
    [
        (np.arange(4, 14), {"max_new_tokens": 503}, "prompt of 10 tokens plus max_new_tokens \\(503\\).*\\(512\\)"),
        (np.array([], np.int32), {}, "empty prompt"),
        (np.array([5, VOCAB]), {}, f"Token id {VOCAB} is outside"),
        (np.array([5, -1]), {}, "Token id -1 is outside"),
        (np.array([5]), {"max_new_tokens": 0}, "max_new_tokens >= 1"),
        (np.array([5]), {"temperature": -1.0}, "temperature >= 0"),
        (np.array([5]), {"top_p": 0.0}, "0 < top_p <= 1"),
        (np.array([5]), {"stop": ("",)}, "no empty stop"),
    ],
)
def test_invalid_generation_requests_are_refused(engine, prompt, parameters, said):
    with pytest.raises(InputError, match=said):
        run(engine, [prompt], **parameters)


def test_a_row_may_have_the_models_longest_length(engine):
    [one] = run(engine, prompts_of(502), max_new_tokens=10)
    assert len(one.token_ids) == 10 or one.finish_reason == "stop"


def test_scoring_and_generation_share_an_engine(engine, reference):
    async def main():
        sequences, prompts = [sequence(30)], prompts_of(5)
        return await asyncio.gather(
            engine.score(sequences, TopK(4)), engine.generate(prompts, SamplingParameters(5, 0.0), [0]),
            engine.score(sequences, Logprob()),
        )  # fmt: skip

    signals, [written], logprobs = asyncio.run(main())
    assert_correct(signals, reference, [sequence(30)])
    assert torch.equal(signals.target_logprobs, logprobs.target_logprobs) or torch.allclose(
        signals.target_logprobs, logprobs.target_logprobs, atol=1e-5
    )
    assert_logprobs_correct(reference, prompts_of(5)[0], written)


def test_sampling_settings_in_the_model_folder_are_ignored(tmp_path, tiny_teacher):
    """The same with a generation_config.json, as in hub models."""
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_teacher, folder)
    path = folder / "generation_config.json"
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(
        json.dumps(values | {"repetition_penalty": 3.0, "do_sample": True, "temperature": 0.01, "top_k": 1})
    )
    prompts = prompts_of(5, 9)
    ours = run(TransformersEngine(str(folder)), prompts, max_new_tokens=20)
    plain = run(TransformersEngine(tiny_teacher), prompts, max_new_tokens=20)
    assert [w.token_ids.tolist() for w in ours] == [w.token_ids.tolist() for w in plain]


def test_a_limited_vocabulary_moves_the_probability_of_other_tokens_to_the_tail(tmp_path, reference):
    reference.save_pretrained(tmp_path)
    tiny_tokenizer(tmp_path)
    limited = TransformersEngine(str(tmp_path), vocab_size=VOCAB - 40)
    sequences = [TokenSequence(np.arange(4, 44, dtype=np.int32), np.arange(40) > 0)]
    exact = dense(reference, sequences)
    signals = score(limited, sequences, TopK(VOCAB - 40, (1.0, 2.0)))
    assert (signals.vocab_size, int(signals.ids.max())) == (VOCAB - 40, VOCAB - 41)
    torch.testing.assert_close(signals.logprobs, exact.gather(1, signals.ids), atol=1e-4, rtol=0)
    for column, temperature in enumerate((1.0, 2.0)):
        others = (exact[:, VOCAB - 40 :] / temperature).logsumexp(1)
        torch.testing.assert_close(signals.log_tails[:, column], others, atol=1e-4, rtol=0)
    with pytest.raises(InputError, match=f"Token id {VOCAB - 1} is outside"):
        score(limited, [TokenSequence(np.array([4, VOCAB - 1], np.int32), np.array([False, True]))], TopK(2))


def test_completions_of_texts_may_contain_tokens_that_those_of_ids_may_not(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[VOCAB - 4 : VOCAB] *= 20
    model.save_pretrained(tmp_path)
    tiny_tokenizer(tmp_path)
    limited = TransformersEngine(str(tmp_path), vocab_size=VOCAB - 4)
    text = limited.tokenizer.decode([VOCAB - 1]) + " the cat"
    [of_text] = run(limited, [text], max_new_tokens=30)
    [of_ids] = run(limited, [np.array([5, 6])], max_new_tokens=30)
    assert of_text.token_ids.max() >= VOCAB - 4 > of_ids.token_ids.max()


def test_padding_with_probability_is_refused_when_the_engine_starts(tmp_path, engine):
    asyncio.run(engine.warm_up())  # ordinary padding
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[VOCAB:] *= 30
    model.save_pretrained(tmp_path)
    tiny_tokenizer(tmp_path)
    with pytest.raises(InputError, match=rf"384 rows .* only {VOCAB} tokens.*set the rows without a token to zero"):
        asyncio.run(TransformersEngine(str(tmp_path)).warm_up())


def test_a_model_that_computes_no_further_is_unhealthy(tiny_teacher):
    engine = TransformersEngine(tiny_teacher, TransformersEngineConfig(stall_seconds=0.2))
    entered, go_on = threading.Event(), threading.Event()

    def hang(*_):
        entered.set()
        assert go_on.wait(60)

    hook = get_body(engine.model).layers[1].register_forward_pre_hook(hang)

    async def main():
        scoring = asyncio.create_task(engine.score([sequence(9)], TopK(2)))
        await asyncio.to_thread(entered.wait, 60)
        await asyncio.sleep(0.3)
        with pytest.raises(RuntimeError, match="has computed one forward pass for"):
            await engine.check_health()
        hook.remove()
        go_on.set()
        await scoring
        await engine.check_health()

    asyncio.run(main())


def test_a_device_map_changes_no_signal(engine, tiny_teacher):
    spread = TransformersEngine(tiny_teacher, TransformersEngineConfig(device_map="auto"))
    assert spread.model.device.type == "cpu"
    sequences = [sequence(9, 1), sequence(40, 2)]
    ours, theirs = (score(one, sequences, TopK(8)) for one in (spread, engine))
    assert torch.equal(ours.logprobs, theirs.logprobs)
    prompts = prompts_of(3, 9)
    generated = [
        [row.token_ids.tolist() for row in asyncio.run(one.generate(prompts, SamplingParameters(8, 0.0), [0, 0]))]
        for one in (spread, engine)
    ]
    assert generated[0] == generated[1]
