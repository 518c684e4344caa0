"""The teacher's output for sequences: `SignalBatch`. `rayk.signals.wire` encodes it for the network.

A signal covers the *counted* tokens of a sequence. Position i of a row is the teacher's distribution of the i-th
counted token given all tokens before it. A row contains counted tokens only, so the teacher may read another context
than the student.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rayk.config.support import Hidden, Requested, Support, TopK, final_dtype
from rayk.errors import InputError
from rayk.models import Head
from rayk.signals.layer_states import expand_states

COLUMNS = (
    "target_logprobs", "ids", "logprobs", "log_tails", "weights", "entropies", "hidden", "head_of", "layers",
    "layer_scales",
)  # fmt: skip


@dataclass(frozen=True)
class SignalBatch:
    """Signals of many sequences, packed row after row. The support determines the columns.

    Attributes:
        support: the part of the distribution that the signals contain.
        offsets: int64 [rows + 1]; row r consists of the positions offsets[r]:offsets[r + 1].
        target_logprobs: float32 [tokens], log p of the actual next token, in nats.
        vocab_size: the teacher's real vocabulary.
        ids: int64 [tokens, k], unique at each position, likeliest first (`topk`, `requested`; `sampled`: in no order).
        logprobs: float32 [tokens, k], log p of `ids` at temperature 1 (`topk`, `requested`).
        log_tails: float32 [tokens, temperatures], log Σ p^(1/T) over the tokens not in `ids`; -inf if `ids` has all
            tokens (`topk`, `requested`).
        weights: float32 [tokens, k], unbiased estimates of p at `ids`; 0 marks an id that only fills the row
            (`sampled`).
        entropies: float32 [tokens], the teacher's entropy in nats (`sampled`).
        hidden: [tokens, width] in the support's dtype, final hidden states (`hidden`; `layers` with `final`).
        head: the map from `hidden` to logits. It is not part of the wire format; the client adds it.
        heads: instead of `head`, the heads of several teachers that scored different rows; `hidden` is then padded to
            the largest width.
        head_of: int64 [tokens], the index in `heads` of each position's head; None with a single head.
        layers: [tokens, layers, width], the layers' states in the support's dtype (`layers`).
        layer_scales: bfloat16 [tokens, layers, blocks], the scales of `layers` in dtype `int8`
            (`rayk.signals.layer_states`).
    """

    support: Support
    offsets: Tensor
    target_logprobs: Tensor
    vocab_size: int
    ids: Tensor | None = None
    logprobs: Tensor | None = None
    log_tails: Tensor | None = None
    weights: Tensor | None = None
    entropies: Tensor | None = None
    hidden: Tensor | None = None
    head: Head | None = None
    heads: tuple[Head, ...] = ()
    head_of: Tensor | None = None
    layers: Tensor | None = None
    layer_scales: Tensor | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def tokens(self) -> int:
        """Number of counted positions in the batch."""
        return len(self.target_logprobs)

    def to(self, device: torch.device | str) -> "SignalBatch":
        """Return the same signals on `device`."""
        head = None if self.head is None else self.head.to(device)
        heads = tuple(one.to(device) for one in self.heads)
        return replace(self._map(lambda column: column.to(device), self.offsets), head=head, heads=heads)

    def select(self, rows: Sequence[int]) -> "SignalBatch":
        """Return the given rows, in the given order."""
        starts, lengths = self.offsets[:-1], self.offsets.diff()
        chosen = torch.as_tensor(rows, dtype=torch.long, device=self.offsets.device)
        offsets = to_offsets(lengths[chosen])
        within = torch.arange(int(offsets[-1]), device=offsets.device) - offsets[:-1].repeat_interleave(lengths[chosen])
        positions = starts[chosen].repeat_interleave(lengths[chosen]) + within
        return self._map(lambda column: column[positions], offsets)

    def slice_tokens(self, chosen: slice) -> "SignalBatch":
        """Return the positions `chosen` as one row, without a copy."""
        length = len(range(*chosen.indices(self.tokens)))
        return self._map(lambda column: column[chosen], torch.tensor([0, length]))

    def select_tokens(self, positions: Tensor) -> "SignalBatch":
        """Return the given positions, in the given order, as one row."""
        return self._map(lambda column: column[positions], torch.tensor([0, len(positions)]))

    def at_temperature(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return the teacher's coarse-grained distribution: log-probs of `ids` [tokens, k] and of the tail [tokens].

        They are normalized over the k + 1 outcomes, so that they sum to 1 in spite of rounding in the wire format.

        Raises:
            InputError: the support has no such distribution, or the signal does not contain this temperature.
        """
        if not isinstance(self.support, TopK | Requested) or self.logprobs is None or self.log_tails is None:
            advice = {
                "sampled": "it estimates forward KL and cross-entropy only",
                "hidden": "use its logits()",
                "logprob": "kl_estimate needs only the actual tokens' log-probs",
                "layers": "with 'final', use logits() of its as_hidden()",
            }[self.support.kind]
            raise InputError(
                f"A '{self.support.kind}' signal has no top-k distribution ({advice}); request support 'topk' or "
                "'hidden'."
            )
        if temperature not in self.support.temperatures:
            raise InputError(
                f"The signal does not contain temperature {temperature:g} (it has "
                f"{', '.join(f'{t:g}' for t in self.support.temperatures)}); add it to the support's 'temperatures', "
                "since the tail at another temperature cannot be computed from the top k."
            )
        tail = self.log_tails[:, self.support.temperatures.index(temperature)]
        outcomes = torch.cat([self.logprobs / temperature, tail[:, None]], dim=1)
        outcomes = outcomes - outcomes.logsumexp(dim=1, keepdim=True)
        return outcomes[:, :-1], outcomes[:, -1]

    def keep_likeliest(self, k: int) -> "SignalBatch":
        """Return the signals with the first `k` ids only; the others join the tail (`topk`)."""
        if not isinstance(self.support, TopK) or self.logprobs is None or self.support.k <= k:
            return self
        assert self.ids is not None and self.log_tails is not None
        dropped = [(self.logprobs[:, k:] / temperature).logsumexp(dim=1) for temperature in self.support.temperatures]
        return replace(
            self, support=replace(self.support, k=k), ids=self.ids[:, :k], logprobs=self.logprobs[:, :k],
            log_tails=torch.logaddexp(self.log_tails, torch.stack(dropped, dim=1)),
        )  # fmt: skip

    def logits(self) -> Tensor:
        """Return the teacher's logits over its whole vocabulary, float32 [tokens, columns of its head] (`hidden`).

        With several heads, columns that a head lacks are -inf.

        Raises:
            InputError: the signal contains no hidden states, or neither `head` nor `heads` is set.
        """
        if self.hidden is None or not (self.head or self.heads):
            raise InputError("Only a 'hidden' signal with its teacher's head has logits; request support 'hidden'.")
        if self.head is not None:
            return self.head.logits(self.hidden.to(self.head.weight.dtype))
        assert self.head_of is not None
        columns = max(head.vocab_size for head in self.heads)
        logits = self.hidden.new_full((self.tokens, columns), -torch.inf, dtype=torch.float32)
        for number, head in enumerate(self.heads):
            positions = (self.head_of == number).nonzero()[:, 0]
            states = self.hidden[positions, : head.width].to(head.weight.dtype)
            logits[positions, : head.vocab_size] = head.logits(states)
        return logits

    def layer_states(self, number: int) -> Tensor:
        """Return the states of the layer at place `number` of the support's layers, float32 [tokens, width]."""
        if self.layers is None:
            raise InputError(f"A '{self.support.kind}' signal has no states of layers; request support 'layers'.")
        scales = None if self.layer_scales is None else self.layer_scales[:, number]
        return expand_states(self.layers[:, number], scales)

    def as_hidden(self) -> "SignalBatch":
        """Return the final hidden states of a 'layers' signal as a 'hidden' signal.

        Raises:
            InputError: the signal has none.
        """
        if (dtype := final_dtype(self.support)) is None:
            raise InputError("The signal has no final hidden states; request support 'layers' with 'final'.")
        return replace(self, support=Hidden(dtype), layers=None, layer_scales=None)

    def invalid_rows(self) -> dict[int, str]:
        """Return the index of each row that cannot be trained on, with the reason: NaN, infinite values, a log-prob
        clearly above 0, or an id out of range."""
        wrong = {
            "an actual token with a log-prob of NaN, of -inf, or above 0": (
                ~(self.target_logprobs <= 1e-3) | self.target_logprobs.isneginf()
            )
        }
        if self.logprobs is not None:
            wrong["a log-prob of NaN or above 0"] = ~(self.logprobs <= 1e-3).all(1)
        if self.log_tails is not None:
            wrong["a tail of NaN or +inf"] = (self.log_tails.isnan() | self.log_tails.isposinf()).any(1)
        if self.ids is not None:
            wrong[f"a token id outside the vocabulary of {self.vocab_size}"] = (self.ids >= self.vocab_size).any(1)
        if self.weights is not None:
            wrong["a weight that is negative or not finite"] = ~((self.weights >= 0) & self.weights.isfinite()).all(1)
        if self.hidden is not None:
            wrong["a hidden state of NaN or inf"] = ~self.hidden.isfinite().all(1)
        for column in (self.layers, self.layer_scales):
            if column is not None and column.is_floating_point():
                is_broken = ~column.isfinite().flatten(1).all(1)
                wrong["a layer's state of NaN, inf, or above the range of support.dtype"] = is_broken
        found: dict[int, str] = {}
        for reason, positions in wrong.items():
            if not positions.any():  # as nearly always, and in each row of a cache
                continue
            for row in torch.searchsorted(self.offsets, positions.nonzero()[:, 0], right=True).sub(1).tolist():
                found.setdefault(row, reason)
        return found

    def _map(self, change: Callable[[Tensor], Tensor], offsets: Tensor) -> "SignalBatch":
        columns: dict[str, Any] = {
            name: change(column) for name in COLUMNS if (column := getattr(self, name)) is not None
        }
        return replace(self, offsets=offsets.to(columns["target_logprobs"].device), **columns)


def concatenate(batches: Sequence[SignalBatch]) -> SignalBatch:
    """Concatenate the rows of all `batches`, which must have the same support; their heads may differ."""
    batches = _with_all_heads(batches)
    first = batches[0]
    columns: dict[str, Any] = {
        name: torch.cat([getattr(batch, name) for batch in batches])
        for name in COLUMNS
        if getattr(first, name) is not None
    }
    return replace(first, offsets=to_offsets(torch.cat([batch.offsets.diff() for batch in batches])), **columns)


def _with_all_heads(batches: Sequence[SignalBatch]) -> Sequence[SignalBatch]:
    """Return the batches with the heads of all of them, and hidden states of one width, if there are several heads."""
    heads_of = [(batch.head,) if batch.head is not None else batch.heads for batch in batches]
    heads = list({id(head): head for heads in heads_of for head in heads}.values())
    if len(heads) < 2:
        return batches
    number = {id(head): i for i, head in enumerate(heads)}
    width = max(head.width for head in heads)
    changed = []
    for batch, own in zip(batches, heads_of, strict=True):
        assert batch.hidden is not None
        numbers = torch.tensor([number[id(head)] for head in own])
        head_of = numbers.expand(batch.tokens) if batch.head_of is None else numbers[batch.head_of]
        hidden = F.pad(batch.hidden, (0, width - batch.hidden.shape[1]))
        changed.append(replace(batch, hidden=hidden, head=None, heads=tuple(heads), head_of=head_of))
    return changed


def fill_distinct(ids: Tensor, used: Tensor) -> Tensor:
    """Replace each unused id in `ids` [tokens, k] by the smallest id that is not yet in its row.

    All ids of a row are then distinct, which gather and scatter operations require.
    """
    tokens, k = ids.shape
    # The last column is for ids from k on, which are never replacements.
    taken = torch.zeros(tokens, k + 1, dtype=torch.bool, device=ids.device)
    taken.scatter_(1, torch.where(used & (ids < k), ids, k), True)
    free = taken[:, :k].to(torch.uint8).argsort(dim=1, stable=True)
    rank = (~used).cumsum(1).sub(1).clamp(min=0)
    return torch.where(used, ids, free.gather(1, rank))


def to_offsets(lengths: Tensor) -> Tensor:
    """Return the offsets of rows with these lengths, [rows + 1]."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
