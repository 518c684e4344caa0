"""The transformers engine's verdicts, compared with the model itself."""

import asyncio

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from rayk.engines.speculative import Draft
from rayk.engines.transformers import TransformersEngine
from rayk.errors import InputError
from tests.engines.reference import VOCAB, sequence
from tests.tiny import tiny_tokenizer


@torch.no_grad()
def exact(model, ids):
    """Return log p of every next token among the real ones, [length, VOCAB]."""
    return model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0, :, :VOCAB].float().log_softmax(1)


def draft_of(length, drafted, seed=0, coins=0.0, logprobs=-3.0, **settings):
    settings = {"alpha": 0.5, "candidates": 8} | settings
    ids = sequence(length, seed).input_ids
    return Draft(ids, np.full(drafted, logprobs, np.float32), np.full(drafted, coins), seed=seed, **settings)


def verify(engine, drafts):
    return asyncio.run(engine.verify(drafts))


def assert_correct(verdict, draft, model):
    table = exact(model, draft.input_ids).numpy()
    log_p = table[np.arange(draft.start - 1, len(draft) - 1), draft.input_ids[draft.start :]]
    accepted = draft.count_accepted(log_p)
    assert verdict.accepted == accepted
    np.testing.assert_allclose(verdict.logprobs, log_p[: accepted + 1], atol=1e-4)
    assert len(verdict.candidates) == (0 if draft.drafted and accepted == draft.drafted else draft.candidates)
    np.testing.assert_allclose(
        verdict.candidate_logprobs, table[draft.start + accepted - 1, verdict.candidates], atol=1e-4
    )


def test_verdicts_equal_the_models_own_in_any_batch(engine, reference):
    """All, some or no tokens accepted, or none drafted; sequences of different lengths, cached or not, in one batch."""
    coins = {"coins": 0.499}, {"coins": 0.8, "logprobs": -15.0}, {"coins": 0.999, "logprobs": -0.01}
    drafts = [draft_of(20 + 7 * i, 1 + 3 * i, i, **coins[i % 3]) for i in range(8)] + [draft_of(15, 0, 9, candidates=3)]
    first = verify(engine, drafts)
    outcomes = [(verdict.accepted, draft.drafted) for verdict, draft in zip(first, drafts, strict=True)]
    assert any(accepted == drafted > 0 for accepted, drafted in outcomes)
    assert any(0 < accepted < drafted for accepted, drafted in outcomes)
    assert any(accepted == 0 < drafted for accepted, drafted in outcomes)
    for verdict, draft in zip(first + verify(engine, drafts), drafts * 2, strict=True):
        assert_correct(verdict, draft, reference)


def test_sequences_with_equal_seeds_are_told_apart(engine, reference):
    one, other = draft_of(30, 4, seed=1), draft_of(30, 4, seed=2)
    other = Draft(other.input_ids, other.logprobs, other.coins, 0.5, seed=1, candidates=8)
    longer = Draft(np.concatenate([one.input_ids[:20], other.input_ids]), other.logprobs, other.coins, 0.5, 1, 8)
    for draft in (one, other, longer, one):
        assert_correct(verify(engine, [draft])[0], draft, reference)


def test_the_prefix_cache_is_bounded_and_not_required(tiny_teacher, reference):
    engine = TransformersEngine(tiny_teacher)
    cache = engine._verifier._cache
    cache._max_bytes = 100_000
    drafts = [draft_of(40, 4, i) for i in range(30)]
    verify(engine, drafts)
    assert 0 < cache.nbytes <= 100_000
    assert cache.nbytes == sum(past.nbytes for _, past in cache._entries.values())
    assert 0 < len(cache._entries) < 30
    assert sorted(cache._entries) == list(range(30 - len(cache._entries), 30))  # the most recent ones
    cache._max_bytes = 0
    for verdict, draft in zip(verify(engine, drafts), drafts, strict=True):
        assert_correct(verdict, draft, reference)
    assert cache.nbytes == 0


def test_candidates_follow_the_model_and_are_never_repeated(engine, reference):
    everything = verify(engine, [draft_of(20, 0, 3, candidates=3000)])[0].candidates
    parts = [verify(engine, [draft_of(20, 0, 3, candidates=1000, tried=tried)])[0] for tried in (0, 1000, 2000)]
    np.testing.assert_array_equal(np.concatenate([part.candidates for part in parts]), everything)
    p = exact(reference, draft_of(20, 0, 3).input_ids)[-1].double().exp().numpy()
    expected = p / p.sum() * 3000
    common = expected >= 5
    seen = np.bincount(everything, minlength=VOCAB).astype(float)
    cells = np.append(expected[common], expected[~common].sum()), np.append(seen[common], seen[~common].sum())
    assert chisquare(cells[1], cells[0]).pvalue > 1e-4


def test_a_model_without_kv_cache_computes_from_the_start(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=384, hidden_size=16, state_size=4, num_hidden_layers=1)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer(tmp_path)
    engine = TransformersEngine(str(tmp_path))
    assert engine._verifier._cache is None
    drafts = [draft_of(20 + 5 * i, 4, i, coins=0.7) for i in range(3)]
    for verdict, draft in zip(verify(engine, drafts), drafts, strict=True):
        assert_correct(verdict, draft, engine.model)


def test_invalid_drafts_are_refused(engine):
    with pytest.raises(InputError, match="lower max_new_tokens"):
        verify(engine, [draft_of(513, 4)])
    wrong = draft_of(20, 4)
    wrong.input_ids[3] = VOCAB
    with pytest.raises(InputError, match="share a tokenizer"):
        verify(engine, [wrong])
