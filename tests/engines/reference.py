"""Requests to engines, and reference results from the model's own forward pass."""

import numpy as np
import torch

from rayk.models import real_vocab_size
from rayk.signals.batch import COLUMNS
from rayk.signals.sequence import TokenSequence
from tests.tiny import tiny_tokenizer

VOCAB = real_vocab_size(tiny_tokenizer())  # the tiny models' embeddings are padded past it, to 384


def sequence(length, seed=0, counted=None):
    random = np.random.default_rng(seed)
    flags = random.random(length) < 0.5 if counted is None else np.full(length, counted)
    flags[:1] = False
    return TokenSequence(random.integers(4, VOCAB, length).astype(np.int32), flags)


def with_requested_ids(sequences, m, seed=0):
    """Return the sequences with `m` requested ids per position: some duplicate, some -1, one position with only -1."""
    random, result = np.random.default_rng(seed), []
    for one in sequences:
        ids = random.integers(0, VOCAB, (one.counted_tokens, m)).astype(np.int32)
        ids[:, -1] = ids[:, 0]
        ids[random.random(ids.shape) < 0.2] = -1
        ids[:1] = -1
        result.append(TokenSequence(one.input_ids, one.counted, ids))
    return result


@torch.no_grad()
def dense(model, sequences):
    """Return dense log-probs [counted tokens, padded vocab] by the model's own forward pass, sequence by sequence."""
    rows = []
    for one in sequences:
        logits = model(input_ids=torch.from_numpy(one.input_ids.astype(np.int64))[None]).logits[0].float()
        rows.append(logits.log_softmax(1)[torch.from_numpy(np.flatnonzero(one.counted)) - 1])
    return torch.cat(rows)


def assert_correct(signals, model, sequences, atol=1e-4, is_rounded=False):
    """Compare with the dense log-probs; those of `is_rounded` signals are rounded to float16."""
    exact = dense(model, sequences)
    counts = [one.counted_tokens for one in sequences]
    assert signals.offsets.diff().tolist() == counts
    targets = torch.from_numpy(np.concatenate([one.targets for one in sequences]).astype(np.int64))
    torch.testing.assert_close(signals.target_logprobs, exact.gather(1, targets[:, None])[:, 0], atol=atol, rtol=0)
    if signals.ids is None:
        return
    rounding = 2.0**-11 if is_rounded else 0
    at_ids = exact.gather(1, signals.ids)
    torch.testing.assert_close(signals.logprobs, at_ids, atol=atol, rtol=rounding)
    likeliest = exact[:, :VOCAB].topk(signals.ids.shape[1]).values
    torch.testing.assert_close(signals.logprobs, likeliest, atol=atol, rtol=rounding)
    for column, temperature in enumerate(signals.support.temperatures):
        rest = (exact.double().scatter(1, signals.ids, float("-inf")) / temperature).logsumexp(1)
        torch.testing.assert_close(signals.log_tails[:, column].double(), rest, atol=atol, rtol=1e-4)
    assert all(len(set(row)) == len(row) for row in signals.ids.tolist())


def assert_equal_signals(rounded, exact):
    """Compare all columns with those of another engine, whose log-probs are not rounded to float16."""
    assert torch.equal(rounded.offsets, exact.offsets)
    for name in COLUMNS:
        ours, theirs = getattr(rounded, name), getattr(exact, name)
        if theirs is None:
            assert ours is None
        elif name == "ids":  # almost equal tokens may swap places
            assert ours.dtype == theirs.dtype
            assert float((ours == theirs).float().mean()) > 0.98
        else:
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2.0**-11)


def prompts_of(*lengths):
    return [sequence(length, 50 + i).input_ids for i, length in enumerate(lengths)]


@torch.no_grad()
def assert_logprobs_correct(model, prompt, completion):
    ids = torch.from_numpy(np.concatenate([prompt, completion.token_ids]).astype(np.int64))
    exact = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1].float().log_softmax(1)
    exact = exact.gather(1, ids[len(prompt) :, None])[:, 0]
    np.testing.assert_allclose(completion.logprobs, exact.numpy(), atol=1e-3)


@torch.no_grad()
def next_token_logits(model, prompt):
    return model(input_ids=torch.from_numpy(prompt.astype(np.int64))[None]).logits[0, -1, :VOCAB].double()
