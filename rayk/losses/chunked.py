"""Divergences from hidden states: the head is applied to one chunk of positions at a time, so that the logits of all
positions never exist together.

For signals with ids, `linear_log_probs` returns every log-prob that is needed. Full distributions need all logits of a
position (`map_logits`).
"""

from typing import NamedTuple, overload

import torch
from torch import Tensor

from rayk.config.support import Hidden, Requested, Sampled, TopK
from rayk.losses.comparison import compare_outcomes, compare_vocabulary
from rayk.losses.divergences import (
    Divergence,
    check_fit,
    check_sampled,
    find_divergence,
    fit_teacher,
    hidden_outcomes,
    log_probs,
    sampled_forward_kl,
    signal_outcomes,
)
from rayk.losses.linear import linear_chosen_log_probs, linear_log_probs
from rayk.losses.logit_chunks import map_logits
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
    match = linear_match(
        student_hidden, student_head, teacher, divergence, temperature=temperature, targets=targets,
        chunk_tokens=chunk_tokens, compared=0, **options,
    )  # fmt: skip
    return match.divergence if match.cross_entropy is None else (match.divergence, match.cross_entropy)


class Match(NamedTuple):
    """The results of `linear_match`."""

    divergence: Tensor
    """Nats per token, [tokens]."""
    cross_entropy: Tensor | None
    """On the targets at temperature 1, [tokens]; None without targets."""
    terms: dict[str, Tensor]
    """For the metrics, [tokens] each, without gradient."""


def linear_match(
    student_hidden: Tensor,
    student_head: Head,
    teacher: Tensor | SignalBatch,
    divergence: str | Divergence,
    *,
    temperature: float = 1.0,
    targets: Tensor | None = None,
    chunk_tokens: int | None = None,
    compared: int = 0,
    **options: float,
) -> Match:
    """Like `linear_divergence`, with terms for the metrics.

    These are for signals with ids `teacher_mass` and `student_mass`, the probability on these ids (the divergence does
    not see where the remaining mass goes), and the comparison of the `compared` most likely tokens
    (`compare_outcomes`; 0: none), of which a `sampled` signal has the teacher's entropy only.
    """
    divergence_of = find_divergence(divergence, **options)
    if not isinstance(teacher, SignalBatch) or isinstance(teacher.support, Hidden):
        return _match_distributions(
            student_hidden, student_head, teacher, divergence_of, temperature, targets, chunk_tokens, compared
        )
    if isinstance(teacher.support, Sampled):
        check_sampled(divergence, temperature)
        check_fit(teacher.tokens, teacher.vocab_size, len(student_hidden), student_head.vocab_size)
        assert teacher.ids is not None and teacher.entropies is not None
        chosen, _, target = linear_log_probs(student_hidden, student_head, teacher.ids, targets, 1.0, chunk_tokens)
        terms = {"teacher_entropy": teacher.entropies} if compared else {}
        return Match(sampled_forward_kl(teacher, chosen), _negated(target), terms)
    top_count = min(compared, own_id_count(teacher))
    log_p, log_q, target, top = _outcomes(
        student_hidden, student_head, teacher, targets, temperature, chunk_tokens, top_count
    )
    with torch.no_grad():
        terms = {"teacher_mass": 1 - log_p[:, -1].exp(), "student_mass": 1 - log_q[:, -1].exp()}
    if top is not None:
        terms |= compare_outcomes(log_p, log_q, top, log_p.shape[1] - 1)
    return Match(divergence_of(log_p, log_q, has_tail=True), _negated(target), terms)


def _match_distributions(
    student_hidden: Tensor, student_head: Head, teacher: Tensor | SignalBatch, divergence_of: Divergence,
    temperature: float, targets: Tensor | None, chunk_tokens: int | None, compared: int,
) -> Match:  # fmt: skip
    """Return the match with a teacher's distributions over its whole vocabulary."""
    teacher_tokens, teacher_vocab = (
        (teacher.tokens, teacher.vocab_size) if isinstance(teacher, SignalBatch) else teacher.shape
    )
    check_fit(teacher_tokens, teacher_vocab, len(student_hidden), student_head.vocab_size)

    def chunk_loss(
        logits: Tensor, chunk_teacher: Tensor | SignalBatch, chunk_targets: Tensor | None
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        all_log_q = log_q = log_probs(logits, temperature)
        if isinstance(chunk_teacher, SignalBatch):
            log_p, log_q = hidden_outcomes(chunk_teacher, log_q, temperature)
            named = chunk_teacher.vocab_size
        else:
            with torch.no_grad():
                log_p = log_probs(fit_teacher(chunk_teacher, *logits.shape), temperature)
            named = log_q.shape[1]
        losses = [divergence_of(log_p, log_q, has_tail=named < log_q.shape[1])]
        if chunk_targets is not None:
            at_one = all_log_q if temperature == 1.0 else log_probs(logits)
            losses.append(-at_one.gather(1, chunk_targets[:, None])[:, 0])
        return tuple(losses), compare_vocabulary(log_p, log_q, named, compared) if compared else {}

    losses, terms = map_logits(chunk_loss, student_hidden, student_head, teacher, targets, chunk_tokens)
    return Match(losses[0], None if targets is None else losses[1], terms)


def own_id_count(signals: SignalBatch) -> int:
    """Return how many of the teacher's own most likely ids a signal surely contains."""
    own = signals.support.k if isinstance(signals.support, TopK | Requested) else 0
    return 0 if signals.ids is None else min(own, signals.ids.shape[1])


def _negated(log_q: Tensor | None) -> Tensor | None:
    return None if log_q is None else -log_q


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
    return _outcomes(student_hidden, student_head, signals, targets, temperature, chunk_tokens)[:3]


def _outcomes(
    hidden: Tensor, head: Head, signals: SignalBatch, targets: Tensor | None, temperature: float,
    chunk_tokens: int | None, top: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Like `linear_outcomes`, with log q of the student's `top` most likely tokens; None for 0."""
    log_p = signal_outcomes(signals, head.vocab_size, len(hidden), temperature)
    assert signals.ids is not None
    found = linear_chosen_log_probs(hidden, head, signals.ids, targets, temperature, chunk_tokens, top=top)
    return log_p, torch.cat([found.chosen, found.others[:, None]], dim=1), found.targets, found.top
