"""Reduce logits to the columns of a `SignalBatch`, for every engine that computes logits itself."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from rayk.config.support import Requested, Sampled, Support, TopK
from rayk.signals.batch import fill_distinct
from rayk.signals.sequence import TokenSequence

LOGITS_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
"""Memory for the logits that are computed at the same time, by kind of device."""


def logits_rows(device: str, columns: int) -> int:
    """Return the number of positions whose float32 logits over `columns` tokens are in memory at the same time."""
    return max(16, LOGITS_BYTES["cpu" if device == "cpu" else "cuda"] // (4 * columns))


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


@dataclass(frozen=True)
class HeadShard:
    """The columns of the logits that one process of a tensor-parallel group computes.

    Attributes:
        first: the token id of the first column.
        gather: concatenates the contiguous tensors [tokens, n] of all processes to [tokens, processes · n], in the same
            order in every process.
    """

    first: int
    gather: Callable[[Tensor], Tensor]


def reduce_sharded_logits(
    logits: Tensor, shard: HeadShard, targets: Tensor, support: Support, vocab_size: int,
    requested: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Return what `reduce_logits` returns, in each process of a tensor-parallel group, from its own columns.

    Only k numbers a position and process are exchanged, not the logits. Support `sampled` is not implemented.

    Args:
        logits: float32 [tokens, columns of this process]; overwritten.
        requested: int64 [tokens, m], -1 for no id (support `requested`).
    """

    def find(ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the columns of `ids` in this process, and whether they are in it."""
        columns = ids - shard.first
        return columns.clamp(0, logits.shape[1] - 1), (columns >= 0) & (columns < logits.shape[1])

    def log_mass(temperature: float = 1.0) -> Tensor:
        return shard.gather((logits / temperature).logsumexp(1, keepdim=True)).logsumexp(1)

    columns, own = find(targets[:, None])
    target_logits = shard.gather(logits.gather(1, columns).masked_fill(~own, float("-inf"))).amax(1)
    if not isinstance(support, TopK | Requested):
        return {"target_logprobs": target_logits - log_mass()}
    width = min(support.k + (0 if requested is None else requested.shape[1]), vocab_size)
    scores = logits[:, : max(0, vocab_size - shard.first)]
    if requested is not None and scores.shape[1]:
        columns, own = find(requested)
        bonus = torch.where(own & (requested < vocab_size), float("inf"), float("-inf"))
        scores = scores.scatter_reduce(1, columns.clamp(max=scores.shape[1] - 1), bonus, "amax")
    best, columns = scores.topk(min(width, scores.shape[1]))
    # The last process may have fewer columns than `width`.
    missing = (0, width - columns.shape[1])
    ids = shard.gather(pad(columns + shard.first, missing))
    values = shard.gather(pad(logits.gather(1, columns), missing, value=float("-inf")))
    chosen = shard.gather(pad(best, missing, value=float("-inf"))).topk(width).indices
    values, order = values.gather(1, chosen).sort(dim=1, descending=True)
    ids = ids.gather(1, chosen).gather(1, order)
    columns, own = find(ids)
    logits.scatter_reduce_(1, columns, torch.where(own, float("-inf"), float("inf")), "amin")
    masses = torch.stack([log_mass(temperature) for temperature in (1.0, *support.temperatures)], dim=1)
    normalizer = torch.logaddexp(values.logsumexp(1), masses[:, 0])
    return {
        "target_logprobs": target_logits - normalizer,
        "ids": ids,
        "logprobs": values - normalizer[:, None],
        "log_tails": masses[:, 1:] - normalizer[:, None] / torch.tensor(support.temperatures, device=logits.device),
    }


def stack_position_inputs(sequences: list[TokenSequence], support: Support) -> Tensor | None:
    """Return the inputs of `reduce_logits` at each counted token: for `requested` the ids, int64 [tokens, m], -1 for no
    id; for `sampled` uniform random numbers, float64 [tokens, draws]; None for other supports."""
    if isinstance(support, Requested):
        return torch.from_numpy(np.concatenate([s.requested for s in sequences if s.requested is not None]).astype(int))
    if isinstance(support, Sampled):
        coins = [draw_coins(sequence_seed(sequence), sequence.counted_tokens, support) for sequence in sequences]
        return torch.from_numpy(np.concatenate(coins))
    return None


def sequence_seed(sequence: TokenSequence) -> int:
    """Return a number of 64 bits that depends on the sequence only."""
    content = hashlib.blake2b(sequence.input_ids.astype("<i4").tobytes() + np.packbits(sequence.counted).tobytes())
    return int.from_bytes(content.digest()[:8], "little")


def draw_coins(seed: int, tokens: int, support: Sampled) -> np.ndarray:
    """Return uniform random numbers, float64 [tokens, draws], that depend on the support's seed and a sequence's."""
    stream = np.random.Philox(np.random.SeedSequence([support.seed, seed]))
    return np.random.Generator(stream).random((tokens, support.draws))


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
