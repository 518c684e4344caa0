"""Divergences from hidden states: the head is applied to one chunk of positions at a time, so that the logits of all
positions never exist together.

For signals with ids, `linear_log_probs` returns every log-prob that is needed. For full distributions, each chunk is
checkpointed: autograd recomputes its logits in the backward pass.
"""

from typing import overload

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rayk.config.support import Hidden, Sampled
from rayk.losses.divergences import (
    Divergence,
    check_fit,
    check_sampled,
    find_divergence,
    fit_teacher,
    has_tail,
    hidden_outcomes,
    log_probs,
    sampled_forward_kl,
    signal_outcomes,
)
from rayk.losses.linear import chunk_size, linear_log_probs
from rayk.models import Head
from rayk.signals.batch import SignalBatch


@overload
def linear_divergence(
    student_hidden: Tensor,
    student_head: Head,
    teacher: Tensor | SignalBatch,
    divergence: str | Divergence = ...,
    *,
    temperature: float = ...,
    targets: None = None,
    chunk_tokens: int | None = ...,
    **options: float,
) -> Tensor: ...


@overload
def linear_divergence(
    student_hidden: Tensor,
    student_head: Head,
    teacher: Tensor | SignalBatch,
    divergence: str | Divergence = ...,
    *,
    temperature: float = ...,
    targets: Tensor,
    chunk_tokens: int | None = ...,
    **options: float,
) -> tuple[Tensor, Tensor]: ...


def linear_divergence(
    student_hidden: Tensor,
    student_head: Head,
    teacher: Tensor | SignalBatch,
    divergence: str | Divergence = "forward_kl",
    *,
    temperature: float = 1.0,
    targets: Tensor | None = None,
    chunk_tokens: int | None = None,
    **options: float,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return a divergence computed from the student's hidden states, without storing the logits of all positions.

    Args:
        student_hidden: [tokens, width], after the final norm, at counted positions only.
        student_head: the student's head, hidden states to logits.
        teacher: signals (any support but `logprob`), or dense logits [tokens, vocab].
        divergence: a key of `DIVERGENCES`, or a function (see `find_divergence`).
        options: the options of the divergence (beta, alpha, ...).
        temperature: divides both sides' logits.
        targets: int64 [tokens]; if given, the cross-entropy on them (at temperature 1) is computed in the same pass.
        chunk_tokens: positions in a chunk; by default chosen from the vocabulary size.

    Returns:
        Nats per token [tokens]; with `targets` the pair (divergence [tokens], cross-entropy [tokens]).

    Raises:
        InputError: as `forward_kl`; or the divergence or option is unknown.
    """
    divergence_of = find_divergence(divergence, **options)
    if isinstance(teacher, SignalBatch) and isinstance(teacher.support, Sampled):
        check_sampled(divergence, temperature)
        check_fit(teacher.tokens, teacher.vocab_size, len(student_hidden), student_head.vocab_size)
        assert teacher.ids is not None
        chosen, _, target = linear_log_probs(student_hidden, student_head, teacher.ids, targets, 1.0, chunk_tokens)
        distance = sampled_forward_kl(teacher, chosen)
        return distance if target is None else (distance, -target)
    if isinstance(teacher, SignalBatch) and not isinstance(teacher.support, Hidden):
        log_p, log_q, target = linear_outcomes(
            student_hidden, student_head, teacher, targets, temperature, chunk_tokens
        )
        distance = divergence_of(log_p, log_q, has_tail=True)
        return distance if target is None else (distance, -target)

    teacher_tokens, teacher_vocab = (
        (teacher.tokens, teacher.vocab_size) if isinstance(teacher, SignalBatch) else teacher.shape
    )
    check_fit(teacher_tokens, teacher_vocab, len(student_hidden), student_head.vocab_size)

    def chunk_loss(
        hidden: Tensor, chunk_teacher: Tensor | SignalBatch, chunk_targets: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        logits = student_logits(hidden, student_head)
        log_q = log_probs(logits, temperature)
        if isinstance(chunk_teacher, SignalBatch):
            log_p, log_q = hidden_outcomes(chunk_teacher, log_q, temperature)
            distance = divergence_of(log_p, log_q, has_tail=has_tail(chunk_teacher, log_q.shape[1]))
        else:
            with torch.no_grad():
                log_p = log_probs(fit_teacher(chunk_teacher, *logits.shape), temperature)
            distance = divergence_of(log_p, log_q)
        if chunk_targets is None:
            return distance, None
        return distance, -log_probs(logits).gather(1, chunk_targets[:, None])[:, 0]

    size = chunk_size(student_hidden, student_head, chunk_tokens)
    parts = [
        checkpoint(
            chunk_loss,
            student_hidden[start : start + size],
            _positions(teacher, slice(start, start + size)),
            None if targets is None else targets[start : start + size],
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for start in range(0, max(len(student_hidden), 1), size)
    ]
    distance = torch.cat([part[0] for part in parts])
    return distance if targets is None else (distance, torch.cat([part[1] for part in parts]))


def linear_outcomes(
    student_hidden: Tensor,
    student_head: Head,
    signals: SignalBatch,
    targets: Tensor | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the log-probs of teacher and student over a signal's outcomes: each of its ids, and one tail bucket.

    Args:
        signals: signals with k ids at each position and the mass of all other tokens (`topk` or `requested`).

    Returns:
        log p and log q [tokens, k + 1], whose last column is the tail bucket; log q of the targets [tokens], or None
        without targets. Only the student's log-probs carry a gradient.

    Raises:
        InputError: as `linear_log_probs`; or the signals have another number of positions or another vocabulary.
    """
    log_p = signal_outcomes(signals, student_head.vocab_size, len(student_hidden), temperature)
    assert signals.ids is not None
    chosen, others, target = linear_log_probs(
        student_hidden, student_head, signals.ids, targets, temperature, chunk_tokens
    )
    return log_p, torch.cat([chosen, others[:, None]], dim=1), target


def _positions(teacher: Tensor | SignalBatch, chosen: slice) -> Tensor | SignalBatch:
    return teacher.slice_tokens(chosen) if isinstance(teacher, SignalBatch) else teacher[chosen]


def student_logits(hidden: Tensor, head: Head) -> Tensor:
    """Return `head.logits(hidden)`, in float64 if `hidden` is float64."""
    if hidden.dtype != torch.float64:
        return head.logits(hidden)
    logits = F.linear(hidden, head.weight.double(), None if head.bias is None else head.bias.double()) * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
