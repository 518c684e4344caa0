"""Decoupled distillation: separate losses for the gold token and for all other tokens (DKD, arXiv 2203.08679; ATKD,
2402.11890).

With y the gold token, b = (p_y, 1 − p_y), p̂ the teacher's distribution over the other tokens, and q for the student:

    TCKD = KL(b_p ‖ b_q)        the probability of the gold token
    NCKD = KL(p̂ ‖ q̂)           the distribution over the other tokens
    KL(p‖q) = TCKD + (1 − p_y)·NCKD

For signals, the other tokens are the signal's ids without gold, and the tail without gold. NCKD is then coarse-grained
like every divergence here, and the identity holds for the coarse-grained forward KL with gold as a separate outcome.
"""

import torch
from torch import Tensor

from rayk.config.support import Hidden, Requested, TopK
from rayk.errors import InputError
from rayk.losses.divergences import (
    DIVERGENCES,
    EXCLUDED,
    LOG_FLOOR,
    Teacher,
    check_fit,
    fit_teacher,
    hidden_outcomes,
    log_probs,
    signal_outcomes,
)
from rayk.signals.batch import SignalBatch


def decoupled_kl(
    student_logits: Tensor,
    teacher: Teacher,
    targets: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 1.0,
) -> Tensor:
    """α·TCKD + β·NCKD at one temperature. A factor T² and the cross-entropy are left to the caller.

    A gold token outside a signal's ids is split off the tail by the signal's log-prob of the actual token, which is
    known at temperature 1 only; `targets` must then be the tokens that the signal was computed for. If all other tokens
    together have a teacher probability below e^-5000, NCKD is 0.

    Args:
        student_logits: [tokens, vocab].
        teacher: logits [tokens, vocab or fewer], or signals of the same tokens with ids.
        targets: int64 [tokens], the gold tokens (the sampled ones, on-policy).

    Returns:
        Nats per token, [tokens].

    Raises:
        InputError: as `forward_kl`; temperature ≠ 1 with a gold token outside the signal's ids.
    """
    gold, others = _dense_terms(student_logits, teacher, targets, temperature)
    return alpha * gold + beta * others


def adaptive_teaching(
    student_logits: Tensor,
    teacher: Teacher,
    targets: Tensor,
    *,
    alpha: float = 0.2,
    threshold: float | Tensor | None = None,
    counts: tuple[float | Tensor, float | Tensor] | None = None,
) -> Tensor:
    """ATKD (arXiv 2402.11890): α·mean over easy tokens of NCKD + (1 − α)·mean over hard tokens of (TCKD + NCKD).

    A token is easy if the teacher's `gold_uncertainty` is below `threshold`, and hard otherwise (also at equality).
    Each value is already divided by the size of its group: **the sum of the result is the loss**; add it over
    micro-batches and workers without dividing again. An empty group adds 0. The temperature is 1, as in the paper.

    Args:
        student_logits: [tokens, vocab].
        teacher: logits [tokens, vocab or fewer], or signals of the same tokens with ids.
        targets: int64 [tokens], the gold tokens.
        alpha: α, the weight of the easy group.
        threshold: the median of `gold_uncertainty` over the *global* batch; by default over these tokens.
        counts: numbers of (easy, hard) tokens in the *global* batch; by default among these tokens.

    Returns:
        Nats, divided by the group sizes, [tokens].

    Raises:
        InputError: as `forward_kl`.
    """
    gold, others = _dense_terms(student_logits, teacher, targets, 1.0)
    uncertainty = gold_uncertainty(teacher, targets)
    if threshold is None:
        threshold = uncertainty.median() if len(uncertainty) else 0.0
    easy = uncertainty < threshold
    easy_count, hard_count = (easy.sum(), (~easy).sum()) if counts is None else counts
    share = torch.where(easy, alpha / _at_least_one(easy_count, gold), (1 - alpha) / _at_least_one(hard_count, gold))
    return share * (others + torch.where(easy, 0.0, gold))


def gold_uncertainty(teacher: Teacher, targets: Tensor) -> Tensor:
    """UNC = 1 − p(gold) at temperature 1, [tokens], of logits [tokens, vocab] or any signal; no gradient.

    Logits and signals with ids give it as the sum over the other tokens: 1 − p(gold) in float32 is 0 for very confident
    tokens, so that they have no order. Other signals, `hidden` included, give it from the gold token's log-prob.
    """
    if not isinstance(teacher, SignalBatch):
        return _split_outcome(log_probs(teacher.detach()), targets)[1].exp()
    if not isinstance(teacher.support, TopK | Requested) or 1.0 not in teacher.support.temperatures:
        return -teacher.target_logprobs.detach().expm1().clamp(max=0.0)
    log_p, place = signal_with_gold(teacher, targets, teacher.vocab_size, len(targets), 1.0)
    return _split_outcome(log_p, place)[1].exp()


def _dense_terms(
    student_logits: Tensor, teacher: Teacher, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return (TCKD, NCKD), nats per token, [tokens] each."""
    log_q = log_probs(student_logits, temperature)
    if isinstance(teacher, SignalBatch) and isinstance(teacher.support, Hidden):
        check_fit(teacher.tokens, teacher.vocab_size, *student_logits.shape)
        log_p, log_q = hidden_outcomes(teacher, log_q, temperature)
        place = targets
    elif isinstance(teacher, SignalBatch):
        log_p, place = signal_with_gold(teacher, targets, log_q.shape[1], len(log_q), temperature)
        assert teacher.ids is not None
        gold = log_q.gather(1, targets[:, None])
        rest = log_q.scatter(1, teacher.ids, EXCLUDED).scatter(1, targets[:, None], EXCLUDED)
        tail = rest.logsumexp(dim=1, keepdim=True).clamp(min=LOG_FLOOR)
        own_column = (place == teacher.ids.shape[1])[:, None]
        log_q = torch.cat([log_q.gather(1, teacher.ids), torch.where(own_column, gold, LOG_FLOOR), tail], dim=1)
    else:
        log_p, place = log_probs(fit_teacher(teacher, *student_logits.shape), temperature), targets
    return decoupled_terms(log_p, log_q, place)


def decoupled_terms(log_p: Tensor, log_q: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Return (TCKD, NCKD), nats per token, [tokens] each.

    Args:
        log_p: log-probs of the teacher, [tokens, outcomes], without gradient.
        log_q: log-probs of the student over the same outcomes.
        place: int64 [tokens], the column of the gold token.
    """
    kl = DIVERGENCES["forward_kl"]
    gold_p, rest_p, others_p = _split_outcome(log_p, place)
    gold_q, rest_q, others_q = _split_outcome(log_q, place)
    binary = kl(torch.stack([gold_p, rest_p], dim=1), torch.stack([gold_q, rest_q], dim=1))
    return binary, torch.where(rest_p > LOG_FLOOR / 2, kl(others_p, others_q), 0.0)


def _split_outcome(log_probs: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-prob of the outcome at `place`, of all other outcomes together, and of each other outcome given
    that it is not the one at `place`."""
    others = log_probs.scatter(1, place[:, None], EXCLUDED)
    rest = others.logsumexp(dim=1)
    one = log_probs.gather(1, place[:, None])[:, 0]
    return one, rest.clamp(min=LOG_FLOOR), (others - rest[:, None]).clamp(min=LOG_FLOOR)


def signal_with_gold(
    signals: SignalBatch, targets: Tensor, vocab_size: int, tokens: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the teacher's log-probs over (ids, gold if it is not among the ids, tail) [tokens, k + 2], and the column
    of gold [tokens]."""
    outcomes = signal_outcomes(signals, vocab_size, tokens, temperature)
    assert signals.ids is not None
    assert signals.log_tails is not None
    assert isinstance(signals.support, TopK | Requested)
    k = signals.ids.shape[1]
    is_gold = signals.ids == targets[:, None]
    among = is_gold.any(dim=1)
    place = torch.where(among, is_gold.int().argmax(dim=1), k)
    if temperature != 1.0 and not bool(among.all()):
        raise InputError(
            f"{int((~among).sum())} gold tokens are not among the signal's ids, and their log-prob is known at "
            f"temperature 1 only, not at {temperature:g}; use temperature 1, a larger k, or dense logits."
        )
    floor = outcomes.new_full((tokens, 1), LOG_FLOOR)
    if temperature != 1.0:
        return torch.cat([outcomes[:, :k], floor, outcomes[:, k:]], dim=1), place
    # Subtract before normalizing: tail and gold are unrounded, but normalizing mixes in the rounding error of the ids.
    tail = signals.log_tails[:, signals.support.temperatures.index(1.0)].detach()
    gold = torch.minimum(signals.target_logprobs.detach(), tail)
    left = torch.where(gold < tail, tail + torch.log(-torch.expm1(gold - tail)), LOG_FLOOR)
    split = torch.cat([outcomes.new_zeros(tokens, k), gold[:, None], left[:, None]], dim=1)
    assert signals.logprobs is not None
    split[:, :k] = signals.logprobs.detach()
    split = (split - split.logsumexp(dim=1, keepdim=True)).clamp(min=LOG_FLOOR)
    return torch.where(among[:, None], torch.cat([outcomes[:, :k], floor, outcomes[:, k:]], dim=1), split), place


def _at_least_one(count: float | Tensor, like: Tensor) -> Tensor:
    return torch.as_tensor(count, dtype=like.dtype, device=like.device).clamp(min=1)
