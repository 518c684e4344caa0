"""How far a student's next-token distribution is from a teacher's: one definition of each divergence.

Every divergence is written once, on a pair of log-probabilities over the same outcomes. The outcomes are either the
whole vocabulary (dense logits) or the teacher's chosen ids and one *tail bucket* for all other tokens (a
`SignalBatch`). The second is a coarse-graining of the first, so every f-divergence of it is at most the exact one and
grows to it as the ids grow to the vocabulary (ALGORITHMS §22).

All functions return nats per token, float32 inside (float64 stays float64), teacher detached, without a T² factor.
`p` is the teacher's distribution, `q` the student's, `M` a mixture of both.
"""

import difflib
import inspect
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from rayk.config.support import Hidden, Sampled
from rayk.errors import InputError
from rayk.signals.batch import SignalBatch

LOG_FLOOR = -1e4
"""Log-probs below this count as this, with no gradient: a token masked with -inf costs 10,000 nats at most, not inf.

e^-10000 is 0 in any dtype, so the floor moves no probability; it only keeps 0·log 0 and its gradient finite.
"""

# Stands for -inf under a logsumexp over floored log-probs: adds exactly 0 beside them, and gives no NaN gradient alone.
EXCLUDED = 2 * LOG_FLOOR

Teacher = Tensor | SignalBatch


def forward_kl(student_logits: Tensor, teacher: Teacher, *, temperature: float = 1.0) -> Tensor:
    """KL(p‖q) = Σ p·(log p − log q): mass-covering, what word-level distillation minimises. True KL, entropy included.

    Args:
        student_logits: [tokens, vocab].
        teacher: logits [tokens, vocab or fewer], or signals of the same tokens with ids.
        temperature: divides both sides' logits; a signal must carry it.

    Returns:
        Nats per token, [tokens].

    Raises:
        InputError: shapes that do not fit, or a signal without ids or without this temperature.
    """
    return divergence("forward_kl", student_logits, teacher, temperature=temperature)


def reverse_kl(student_logits: Tensor, teacher: Teacher, *, temperature: float = 1.0) -> Tensor:
    """KL(q‖p) = Σ q·(log q − log p): mode-seeking (MiniLLM, arXiv 2306.08543). As `forward_kl` otherwise."""
    return divergence("reverse_kl", student_logits, teacher, temperature=temperature)


def jensen_shannon(student_logits: Tensor, teacher: Teacher, *, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """Generalised JSD of GKD (arXiv 2306.13649 §3): β·KL(p‖M) + (1−β)·KL(q‖M), M = βp + (1−β)q.

    `beta` is the teacher's share of M. 0 and 1 are forward and reverse KL as in TRL, so the scale jumps there:
    JSD(β)/β → KL(p‖q) as β → 0, JSD(β)/(1−β) → KL(q‖p) as β → 1. As `forward_kl` otherwise.
    """
    return divergence("jensen_shannon", student_logits, teacher, temperature=temperature, beta=beta)


def total_variation(student_logits: Tensor, teacher: Teacher, *, temperature: float = 1.0) -> Tensor:
    """½·Σ|p − q|, in [0, 1] (f-distill, arXiv 2307.15190). As `forward_kl` otherwise."""
    return divergence("total_variation", student_logits, teacher, temperature=temperature)


def symmetric_kl(student_logits: Tensor, teacher: Teacher, *, weight: float = 0.5, temperature: float = 1.0) -> Tensor:
    """(1 − weight)·KL(p‖q) + weight·KL(q‖p), `weight` on reverse KL as in DistiLLM. As `forward_kl` otherwise."""
    return divergence("symmetric_kl", student_logits, teacher, temperature=temperature, weight=weight)


def skew_forward_kl(
    student_logits: Tensor, teacher: Teacher, *, alpha: float = 0.1, temperature: float = 1.0
) -> Tensor:
    """KL(p ‖ αp + (1−α)q) of DistiLLM (arXiv 2402.03898 §3.1). As `forward_kl` otherwise."""
    return divergence("skew_forward_kl", student_logits, teacher, temperature=temperature, alpha=alpha)


def skew_reverse_kl(
    student_logits: Tensor, teacher: Teacher, *, alpha: float = 0.1, temperature: float = 1.0
) -> Tensor:
    """KL(q ‖ (1−α)p + αq) of DistiLLM; the gradient also flows through the q inside the mixture (v1, not DistiLLM-2).

    As `forward_kl` otherwise.
    """
    return divergence("skew_reverse_kl", student_logits, teacher, temperature=temperature, alpha=alpha)


def adaptive_kl(student_logits: Tensor, teacher: Teacher, *, mu: float = 0.5, temperature: float = 1.0) -> Tensor:
    """(g_h·KL(p‖q) + g_t·KL(q‖p)) / (g_h + g_t), g = Σ|p − q| over head and tail, detached (arXiv 2404.02657).

    The head is the likeliest tokens with cumulative p ≤ `mu`; the token that crosses it is tail, the top token always
    head, a signal's tail bucket always tail. Not an f-divergence: the sparse value may exceed the exact one. As
    `forward_kl` otherwise.
    """
    return divergence("adaptive_kl", student_logits, teacher, temperature=temperature, mu=mu)


def divergence(
    name: str, student_logits: Tensor, teacher: Teacher, *, temperature: float = 1.0, **options: float
) -> Tensor:
    """The divergence called `name` with its own `options`, for callers that read both from settings.

    Raises:
        InputError: no such name or option, or as `forward_kl`.
    """
    pair = find_divergence(name, **options)
    if isinstance(teacher, SignalBatch) and isinstance(teacher.support, Sampled):
        check_sampled(teacher, name, temperature)
        check_fit(teacher.tokens, teacher.vocab_size, *student_logits.shape)
        assert teacher.ids is not None
        return sampled_forward_kl(teacher, log_probs(student_logits).gather(1, teacher.ids))
    log_p, log_q = outcomes(student_logits, teacher, temperature)
    return pair(log_p, log_q, has_tail=isinstance(teacher, SignalBatch) and teacher.ids is not None)


def find_divergence(name: str, **options: float) -> Callable[..., Tensor]:
    """`DIVERGENCES[name]` with `options` filled in: (log_p, log_q, *, has_tail) of [tokens, outcomes] -> [tokens].

    Raises:
        InputError: no such name or option; the sentence names the nearest one.
    """
    if name not in DIVERGENCES:
        raise InputError(f"There is no divergence '{name}'; did you mean '{_nearest(name, list(DIVERGENCES))}'?")
    known = [option for option in inspect.signature(DIVERGENCES[name]).parameters if option not in _PAIR_ARGUMENTS]
    for option, value in options.items():
        if option not in known:
            hint = f"did you mean '{_nearest(option, known)}'?" if known else "it has none."
            raise InputError(f"The divergence '{name}' has no option '{option}'; {hint}")
        if not 0.0 <= value <= 1.0:
            raise InputError(f"'{option}' of '{name}' is {value:g}; give a number from 0 to 1.")
    return partial(DIVERGENCES[name], **options)


def outcomes(student_logits: Tensor, teacher: Teacher, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Teacher's and student's floored log-probs over the same outcomes, [tokens, vocab] or [tokens, k + 1].

    The teacher's are detached. With signals that have ids the last outcome is the tail bucket: all other tokens.
    """
    log_q = log_probs(student_logits, temperature)
    if isinstance(teacher, SignalBatch) and isinstance(teacher.support, Hidden):
        check_fit(teacher.tokens, teacher.vocab_size, *student_logits.shape)
        return log_probs(hidden_logits(teacher, student_logits.shape[1]), temperature), log_q
    if isinstance(teacher, SignalBatch):
        log_p = signal_outcomes(teacher, student_logits.shape[1], len(student_logits), temperature)
        assert teacher.ids is not None
        chosen = log_q.gather(1, teacher.ids)
        tail = log_q.scatter(1, teacher.ids, EXCLUDED).logsumexp(dim=1, keepdim=True).clamp(min=LOG_FLOOR)
        return log_p, torch.cat([chosen, tail], dim=1)
    return log_probs(fit_teacher(teacher, *student_logits.shape), temperature), log_q


def log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / T), at least float32, at least LOG_FLOOR; [tokens, vocab]."""
    if not temperature > 0:
        raise InputError(f"The temperature is {temperature:g}; give a number above 0.")
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if temperature != 1.0:
        wide = wide / temperature
    return wide.log_softmax(dim=-1).clamp(min=LOG_FLOOR)


def signal_outcomes(signals: SignalBatch, vocab_size: int, tokens: int, temperature: float = 1.0) -> Tensor:
    """The teacher's floored log-probs of its ids and the tail bucket, [tokens, k + 1]; they must fit the student."""
    log_p, log_tail = signals.at_temperature(temperature)
    check_fit(signals.tokens, signals.vocab_size, tokens, vocab_size)
    if log_p.shape[1] == vocab_size:  # the student has nothing else, not even the padding the teacher may have
        log_p, log_tail = log_p - log_p.logsumexp(dim=1, keepdim=True), torch.full_like(log_tail, -torch.inf)
    return torch.cat([log_p, log_tail[:, None]], dim=1).detach().clamp(min=LOG_FLOOR)


def fit_teacher(logits: Tensor, tokens: int, vocab_size: int) -> Tensor:
    """A teacher's dense logits, detached, padded with -inf to a student whose vocabulary is padded further."""
    check_fit(len(logits), logits.shape[1], tokens, vocab_size)
    missing = vocab_size - logits.shape[1]
    return F.pad(logits.detach(), (0, missing), value=-torch.inf) if missing else logits.detach()


def hidden_logits(signals: SignalBatch, columns: int) -> Tensor:
    """The logits of a `hidden` signal, detached, in a student's number of columns: what either side's embedding is
    padded by beyond the other's has no probability on the other side."""
    logits = signals.logits().detach()[:, :columns]
    return F.pad(logits, (0, columns - logits.shape[1]), value=-torch.inf)


def check_sampled(signals: SignalBatch, name: str, temperature: float) -> None:
    """Raise InputError where random draws cannot estimate the divergence without bias."""
    if name != "forward_kl" or temperature != 1.0:
        raise InputError(
            f"A 'sampled' signal estimates forward_kl at temperature 1 only, not {name} at {temperature:g}; ask the "
            "teacher for support 'hidden' (exact) or 'topk'."
        )


def sampled_forward_kl(signals: SignalBatch, log_q: Tensor) -> Tensor:
    """Σ w·(−log q) − H(p): an unbiased estimate of KL(p‖q), as is its gradient (arXiv 2503.16870); may be below 0.

    Args:
        signals: with support `sampled`.
        log_q: the student's log-probs at the signal's ids, [tokens, k].
    """
    assert signals.weights is not None
    assert signals.entropies is not None
    return -(signals.weights * log_q).sum(dim=1) - signals.entropies


def check_fit(teacher_tokens: int, teacher_vocab: int, tokens: int, vocab_size: int) -> None:
    """Raise InputError where the teacher's shape does not fit the student's."""
    if teacher_tokens != tokens:
        raise InputError(
            f"The teacher speaks of {teacher_tokens} tokens but the student of {tokens}; "
            "give both the same counted positions."
        )
    if teacher_vocab > vocab_size:
        raise InputError(
            f"The teacher's vocabulary has {teacher_vocab} tokens but the student's logits only {vocab_size} columns; "
            "use a student with the teacher's tokenizer, or cut the teacher's padding columns off."
        )


# The definitions, on log-probs [tokens, outcomes]. `has_tail`: the last outcome is a bucket of many tokens.


def _forward_kl(log_p: Tensor, log_q: Tensor, *, has_tail: bool = False) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def _reverse_kl(log_p: Tensor, log_q: Tensor, *, has_tail: bool = False) -> Tensor:
    return _forward_kl(log_q, log_p)


def _total_variation(log_p: Tensor, log_q: Tensor, *, has_tail: bool = False) -> Tensor:
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(dim=-1)


def _jensen_shannon(log_p: Tensor, log_q: Tensor, *, has_tail: bool = False, beta: float = 0.5) -> Tensor:
    if beta in (0.0, 1.0):
        return _reverse_kl(log_p, log_q) if beta else _forward_kl(log_p, log_q)
    difference = log_q - log_p
    to_mixture = _log_mixture(difference, beta)  # log M − log p
    return -(beta * log_p.exp() * to_mixture + (1 - beta) * log_q.exp() * (to_mixture - difference)).sum(dim=-1)


def _symmetric_kl(log_p: Tensor, log_q: Tensor, *, has_tail: bool = False, weight: float = 0.5) -> Tensor:
    return (((1 - weight) * log_p.exp() - weight * log_q.exp()) * (log_p - log_q)).sum(dim=-1)


def _skew_forward_kl(log_p: Tensor, log_q: Tensor, *, has_tail: bool = False, alpha: float = 0.1) -> Tensor:
    return -(log_p.exp() * _log_mixture(log_q - log_p, alpha)).sum(dim=-1)


def _skew_reverse_kl(log_p: Tensor, log_q: Tensor, *, has_tail: bool = False, alpha: float = 0.1) -> Tensor:
    return _skew_forward_kl(log_q, log_p, alpha=alpha)


def _adaptive_kl(log_p: Tensor, log_q: Tensor, *, has_tail: bool = False, mu: float = 0.5) -> Tensor:
    p, q = log_p.exp(), log_q.exp()
    single_tokens = p[:, :-1] if has_tail else p
    mass, order = single_tokens.sort(dim=-1, descending=True)
    starts_head = mass.cumsum(dim=-1) <= mu
    starts_head[:, :1] = True
    in_head = torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, starts_head)
    gap = (p - q).abs().detach()
    head_gap, tail_gap = (gap * in_head).sum(dim=-1), (gap * ~in_head).sum(dim=-1)
    both = (head_gap + tail_gap).clamp(min=torch.finfo(gap.dtype).tiny)  # equal distributions: 0, not 0/0
    difference = log_p - log_q
    return (head_gap * (p * difference).sum(dim=-1) - tail_gap * (q * difference).sum(dim=-1)) / both


def _log_mixture(difference: Tensor, share: float) -> Tensor:
    """log(share·a + (1 − share)·b) − log a, from log b − log a: exact near a = b, where the log-probs would cancel."""
    own, other = torch.tensor([share, 1 - share], dtype=difference.dtype, device=difference.device).log()
    return torch.logaddexp(own, other + difference)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jensen_shannon": _jensen_shannon,
    "total_variation": _total_variation,
    "symmetric_kl": _symmetric_kl,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "adaptive_kl": _adaptive_kl,
}
"""Every divergence by name: (log_p, log_q, *, has_tail, **options) on [tokens, outcomes] -> nats, [tokens]."""

_PAIR_ARGUMENTS = ("log_p", "log_q", "has_tail")


def _nearest(word: str, words: Sequence[str]) -> str:
    return difflib.get_close_matches(word, words, n=1, cutoff=0.0)[0]
