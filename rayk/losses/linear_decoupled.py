"""Decoupled distillation from the student's hidden states, without storing the logits of all positions."""

from typing import NamedTuple

import torch
from torch import Tensor

from rayk.config.support import Hidden
from rayk.losses.chunked import own_id_count
from rayk.losses.comparison import compare_outcomes, compare_vocabulary
from rayk.losses.decoupled import decoupled_terms, signal_with_gold
from rayk.losses.divergences import LOG_FLOOR, check_fit, hidden_outcomes, log_probs
from rayk.losses.linear import linear_chosen_log_probs
from rayk.losses.logit_chunks import map_logits
from rayk.models import Head
from rayk.signals.batch import SignalBatch


class DecoupledTerms(NamedTuple):
    """The parts of a decoupled loss, nats per token, [tokens] each."""

    target: Tensor
    """TCKD: the divergence in the probability of the gold token."""
    others: Tensor
    """NCKD: the divergence of the distributions over the other tokens."""
    cross_entropy: Tensor
    """−log q(gold) at temperature 1."""
    comparison: dict[str, Tensor] = {}  # noqa: RUF012 - never changed
    """The comparison of both distributions (`compare_outcomes`), if it was requested."""


def linear_decoupled_terms(
    student_hidden: Tensor,
    student_head: Head,
    teacher: SignalBatch,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    compared: int = 0,
) -> DecoupledTerms:
    """Return the parts of `decoupled_kl`, computed from the student's hidden states one chunk of positions at a time.

    Args:
        student_hidden: [tokens, width], after the final norm, at counted positions only.
        student_head: the student's head, hidden states to logits.
        teacher: signals of the same positions with support `topk`, `requested` or `hidden`.
        targets: int64 [tokens], the gold tokens, for which the signals were computed.
        temperature: divides both sides' logits in the first two parts.
        chunk_tokens: positions in a chunk; by default chosen from the vocabulary size.
        compared: number of most likely tokens to compare; 0: no comparison.

    Raises:
        InputError: as `decoupled_kl`.
    """
    if not isinstance(teacher.support, Hidden):
        return _terms_of_ids(student_hidden, student_head, teacher, targets, temperature, chunk_tokens, compared)
    check_fit(teacher.tokens, teacher.vocab_size, len(student_hidden), student_head.vocab_size)

    def terms(logits: Tensor, signals: SignalBatch, gold: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        log_p, log_q = hidden_outcomes(signals, log_probs(logits, temperature), temperature)
        cross_entropy = -log_probs(logits).gather(1, gold[:, None])[:, 0]
        comparison = compare_vocabulary(log_p, log_q, signals.vocab_size, compared) if compared else {}
        return (*decoupled_terms(log_p, log_q, gold), cross_entropy), comparison

    losses, comparison = map_logits(terms, student_hidden, student_head, teacher, targets, chunk_tokens, store=False)
    target, others, cross_entropy = losses
    return DecoupledTerms(target, others, cross_entropy, comparison)


def _terms_of_ids(
    hidden: Tensor, head: Head, signals: SignalBatch, targets: Tensor, temperature: float, chunk_tokens: int | None,
    compared: int,
) -> DecoupledTerms:  # fmt: skip
    """Return the parts for signals with ids. The student's log-probs are computed at the ids and at one further id: the
    gold token, or, where gold is among the ids, any other token, whose probability then joins the tail again."""
    log_p, place = signal_with_gold(signals, targets, head.vocab_size, len(hidden), temperature)
    ids = signals.ids
    assert ids is not None
    k, count = ids.shape[1], min(compared, own_id_count(signals))
    if k == head.vocab_size:
        found = linear_chosen_log_probs(hidden, head, ids, targets, temperature, chunk_tokens, top=count)
        tail = found.others
        chosen = torch.cat([found.chosen, torch.full_like(tail, LOG_FLOOR)[:, None]], dim=1)
    else:
        is_apart = place == k
        further = torch.where(is_apart, targets, _first_absent(ids))
        asked = torch.cat([ids, further[:, None]], dim=1)
        found = linear_chosen_log_probs(hidden, head, asked, targets, temperature, chunk_tokens, top=count)
        tail = torch.where(is_apart, found.others, torch.logaddexp(found.others, found.chosen[:, k]))
        own = torch.where(is_apart, found.chosen[:, k], LOG_FLOOR)
        chosen = torch.cat([found.chosen[:, :k], own[:, None]], dim=1)
    assert found.targets is not None
    log_q = torch.cat([chosen, tail[:, None]], dim=1)
    comparison = {} if found.top is None else compare_outcomes(log_p, log_q, found.top, k + 1)
    return DecoupledTerms(*decoupled_terms(log_p, log_q, place), -found.targets, comparison)


def _first_absent(ids: Tensor) -> Tensor:
    """Return the smallest non-negative integer that is not in each row of distinct `ids` [tokens, k]; [tokens]."""
    positions = torch.arange(ids.shape[1], device=ids.device)
    return (ids.sort(dim=1).values == positions).int().cumprod(dim=1).sum(dim=1)
