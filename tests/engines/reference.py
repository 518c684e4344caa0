"""Requests to engines, and reference results from the model's own forward pass."""

import numpy as np
import torch

from rayk.models import real_vocab_size
from rayk.signals.sequence import TokenSequence
from tests.tiny import tiny_tokenizer

VOCAB = real_vocab_size(tiny_tokenizer())  # the tiny models' embeddings are padded past it, to 384


def sequence(length, seed=0, counted=None):
    random = np.random.default_rng(seed)
    flags = random.random(length) < 0.5 if counted is None else np.full(length, counted)
    flags[:1] = False
    return TokenSequence(random.integers(4, VOCAB, length).astype(np.int32), flags)


@torch.no_grad()
def dense(model, sequences):
    """Return dense log-probs [counted tokens, padded vocab] by the model's own forward pass, sequence by sequence."""
    rows = []
    for one in sequences:
        logits = model(input_ids=torch.from_numpy(one.input_ids.astype(np.int64))[None]).logits[0].float()
        rows.append(logits.log_softmax(1)[torch.from_numpy(np.flatnonzero(one.counted)) - 1])
    return torch.cat(rows)


def assert_correct(signals, model, sequences, atol=1e-4):
    exact = dense(model, sequences)
    counts = [one.counted_tokens for one in sequences]
    assert signals.offsets.diff().tolist() == counts
    targets = torch.from_numpy(np.concatenate([one.targets for one in sequences]).astype(np.int64))
    torch.testing.assert_close(signals.target_logprobs, exact.gather(1, targets[:, None])[:, 0], atol=atol, rtol=0)
    if signals.ids is None:
        return
    torch.testing.assert_close(signals.logprobs, exact.gather(1, signals.ids), atol=atol, rtol=0)
    torch.testing.assert_close(signals.logprobs, exact[:, :VOCAB].topk(signals.ids.shape[1]).values, atol=atol, rtol=0)
    for column, temperature in enumerate(signals.support.temperatures):
        rest = (exact.double().scatter(1, signals.ids, float("-inf")) / temperature).logsumexp(1)
        torch.testing.assert_close(signals.log_tails[:, column].double(), rest, atol=atol, rtol=1e-4)
    assert all(len(set(row)) == len(row) for row in signals.ids.tolist())


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
