"""Reduce logits to the columns of a `SignalBatch`, for every engine that computes logits itself."""

import hashlib

import numpy as np
import torch
from torch import Tensor

from rayk.config.support import Requested, Sampled, Support, TopK
from rayk.signals.batch import fill_distinct
from rayk.signals.sequence import TokenSequence


def reduce_logits(
    logits: Tensor, targets: Tensor, support: Support, vocab_size: int, position_inputs: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the columns of a `SignalBatch` with `support`, computed from float32 logits [tokens, columns].

    The logits are overwritten. Only the first `vocab_size` ids are returned. The other columns are the embedding's
    padding and tokens that the student lacks: they count in the normalizer and in the tail. Draws (`sampled`) are from
    the distribution conditioned on the first `vocab_size` tokens.

    Args:
        targets: int64 [tokens], the actual next tokens.
        position_inputs: result of `stack_position_inputs`, which the supports `requested` and `sampled` require.
    """
    target_logits = logits.gather(1, targets[:, None])[:, 0]
    real = logits[:, :vocab_size]
    if isinstance(support, TopK):
        ids = real.topk(support.k).indices
    elif isinstance(support, Requested):
        assert position_inputs is not None
        requested = torch.where(position_inputs < 0, real.argmax(1, keepdim=True), position_inputs)
        width = min(support.k + requested.shape[1], vocab_size)
        ids = real.scatter(1, requested, float("inf")).topk(width).indices
        ids = ids.gather(1, real.gather(1, ids).argsort(dim=1, descending=True))
    else:
        normalizer = logits.logsumexp(1)
        columns = {"target_logprobs": target_logits - normalizer}
        if isinstance(support, Sampled):
            assert position_inputs is not None
            columns |= _sample_columns(logits, normalizer, support, vocab_size, position_inputs)
        return columns
    values = logits.gather(1, ids)
    unselected = logits.scatter_(1, ids, float("-inf"))
    tail = unselected.logsumexp(1)
    normalizer = torch.logaddexp(values.logsumexp(1), tail)
    tails = [(tail if t == 1.0 else (unselected / t).logsumexp(1)) - normalizer / t for t in support.temperatures]
    return {
        "target_logprobs": target_logits - normalizer,
        "ids": ids,
        "logprobs": values - normalizer[:, None],
        "log_tails": torch.stack(tails, dim=1),
    }


def stack_position_inputs(sequences: list[TokenSequence], support: Support) -> Tensor | None:
    """Return the inputs of `reduce_logits` at each counted token: for `requested` the ids, int64 [tokens, m], -1 for no
    id; for `sampled` uniform random numbers, float64 [tokens, draws]; None for other supports."""
    if isinstance(support, Requested):
        return torch.from_numpy(np.concatenate([s.requested for s in sequences if s.requested is not None]).astype(int))
    if isinstance(support, Sampled):
        return torch.from_numpy(np.concatenate([_draw_coins(sequence, support) for sequence in sequences]))
    return None


def _draw_coins(sequence: TokenSequence, support: Sampled) -> np.ndarray:
    """Return uniform random numbers, float64 [counted tokens, draws], that depend on the seed and the sequence only."""
    content = hashlib.blake2b(sequence.input_ids.astype("<i4").tobytes() + np.packbits(sequence.counted).tobytes())
    stream = np.random.Philox(np.random.SeedSequence([support.seed, int.from_bytes(content.digest()[:8], "little")]))
    return np.random.Generator(stream).random((sequence.counted_tokens, support.draws))


def _sample_columns(
    logits: Tensor, normalizer: Tensor, support: Sampled, vocab_size: int, coins: Tensor
) -> dict[str, Tensor]:
    """Return the distinct ids among the draws from p^τ, their weights (count/draws · p/proposal) and p's entropy.

    p and the proposal are normalized over the first `vocab_size` tokens, so others are never drawn.
    """
    if vocab_size < logits.shape[1]:
        logits = logits[:, :vocab_size]
        normalizer = logits.logsumexp(1)
    logprobs = logits - normalizer[:, None]
    entropies = -torch.where(logprobs.isneginf(), 0.0, logprobs.exp() * logprobs).sum(1)
    real = logprobs.double()
    proposal = (support.tau * real).log_softmax(1)
    cumulative = proposal.exp().cumsum(1)
    draws = torch.searchsorted(cumulative, coins * cumulative[:, -1:], right=True).clamp(max=vocab_size - 1)
    draws = draws.sort(1).values
    group = torch.cat([torch.zeros_like(draws[:, :1]), (draws[:, 1:] != draws[:, :-1]).long()], dim=1).cumsum(1)
    counts = torch.zeros_like(draws).scatter_add_(1, group, torch.ones_like(draws))
    ids = torch.zeros_like(draws).scatter_(1, group, draws)
    weights = counts.double() / support.draws
    if support.tau != 1.0:
        weights *= (real.log_softmax(1) - proposal).gather(1, ids).exp()
    return {"ids": fill_distinct(ids, counts > 0), "weights": weights.float(), "entropies": entropies}
