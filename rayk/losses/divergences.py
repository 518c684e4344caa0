"""Divergences between the next-token distributions of teacher and student, one definition each.

Every divergence is defined once, on the log-probs of teacher and student over the same outcomes. The outcomes are
either the whole vocabulary (dense logits, `hidden` signals), or the ids of a signal and one *tail bucket* for all other
tokens (`topk` and `requested` signals). The second is a coarse-graining of the first: an f-divergence on it is a lower
bound of the exact value, and reaches it as the ids grow to the vocabulary (data processing inequality).

All functions return nats per token, compute in float32 (float64 stays float64), detach the teacher, and have no factor
T². `p` is the teacher's distribution, `q` the student's, and `M` a mixture of both.
"""

import difflib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from rayk.config.support import Hidden, Sampled
from rayk.errors import InputError
from rayk.losses.precision import upcast
from rayk.signals.batch import SignalBatch

logger = logging.getLogger(__name__)

LOG_FLOOR = -1e4
"""Log-probs are at least this value, without gradient below it: a token masked with -inf costs at most 10,000 nats.

e^-10000 is 0 in any dtype, so the floor changes no probability; it keeps 0·log 0 and its gradient finite.
"""

# Replaces -inf in a logsumexp over floored log-probs: next to other terms it adds exactly 0, and if all terms have this
# value the gradient is not NaN.
EXCLUDED = 2 * LOG_FLOOR

Teacher = Tensor | SignalBatch
Divergence = Callable[..., Tensor]
"""(log_p, log_q, *, has_tail, **options) -> nats [tokens], from log-probs [tokens, outcomes]."""


def forward_kl(student_logits: Tensor, teacher: Teacher, *, temperature: float = 1.0) -> Tensor:
    """KL(p‖q) = Σ p·(log p − log q), mass-covering; the entropy of the teacher is included, so the minimum is 0.

    Args:
        student_logits: [tokens, vocab].
        teacher: logits [tokens, vocab or fewer], or signals of the same tokens with ids.
        temperature: divides the logits of both sides; a signal must contain it.

    Returns:
        Nats per token, [tokens].

    Raises:
        InputError: the shapes do not fit, or the signal has no ids or was not requested at this temperature.
    """
    return divergence("forward_kl", student_logits, teacher, temperature=temperature)


def reverse_kl(student_logits: Tensor, teacher: Teacher, *, temperature: float = 1.0) -> Tensor:
    """KL(q‖p) = Σ q·(log q − log p), mode-seeking (MiniLLM, arXiv 2306.08543). Arguments as in `forward_kl`."""
    return divergence("reverse_kl", student_logits, teacher, temperature=temperature)


def jensen_shannon(student_logits: Tensor, teacher: Teacher, *, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """Generalized JSD of GKD (arXiv 2306.13649 §3): β·KL(p‖M) + (1−β)·KL(q‖M), M = βp + (1−β)q.

    `beta` is the share of the teacher in M. As in TRL, 0 and 1 mean forward and reverse KL, so the scale jumps there:
    JSD(β)/β → KL(p‖q) as β → 0, JSD(β)/(1−β) → KL(q‖p) as β → 1. Other arguments as in `forward_kl`.
    """
    return divergence("jensen_shannon", student_logits, teacher, temperature=temperature, beta=beta)


def total_variation(student_logits: Tensor, teacher: Teacher, *, temperature: float = 1.0) -> Tensor:
    """½·Σ|p − q|, in [0, 1] (f-distill, arXiv 2307.15190). Arguments as in `forward_kl`."""
    return divergence("total_variation", student_logits, teacher, temperature=temperature)


def symmetric_kl(student_logits: Tensor, teacher: Teacher, *, weight: float = 0.5, temperature: float = 1.0) -> Tensor:
    """(1 − weight)·KL(p‖q) + weight·KL(q‖p), `weight` on reverse KL as in DistiLLM. Arguments as in `forward_kl`."""
    return divergence("symmetric_kl", student_logits, teacher, temperature=temperature, weight=weight)


def skew_forward_kl(
    student_logits: Tensor, teacher: Teacher, *, alpha: float = 0.1, temperature: float = 1.0
) -> Tensor:
    """KL(p ‖ αp + (1−α)q) of DistiLLM (arXiv 2402.03898 §3.1). Other arguments as in `forward_kl`."""
    return divergence("skew_forward_kl", student_logits, teacher, temperature=temperature, alpha=alpha)


def skew_reverse_kl(
    student_logits: Tensor, teacher: Teacher, *, alpha: float = 0.1, temperature: float = 1.0
) -> Tensor:
    """KL(q ‖ (1−α)p + αq) of DistiLLM; the gradient also flows through the q in the mixture (v1, not DistiLLM-2).

    Other arguments as in `forward_kl`.
    """
    return divergence("skew_reverse_kl", student_logits, teacher, temperature=temperature, alpha=alpha)


def adaptive_kl(student_logits: Tensor, teacher: Teacher, *, mu: float = 0.5, temperature: float = 1.0) -> Tensor:
    """(g_h·KL(p‖q) + g_t·KL(q‖p)) / (g_h + g_t), g = Σ|p − q| over head and tail, detached (AKL, arXiv 2404.02657).

    The head contains the most likely tokens with cumulative p ≤ `mu`, and always the top token; the token that crosses
    `mu` and a signal's tail bucket belong to the tail. Not an f-divergence: on a signal the value may exceed the exact
    one. Other arguments as in `forward_kl`.
    """
    return divergence("adaptive_kl", student_logits, teacher, temperature=temperature, mu=mu)


def divergence(
    name: str | Divergence, student_logits: Tensor, teacher: Teacher, *, temperature: float = 1.0, **options: float
) -> Tensor:
    """Return the divergence `name` with its `options`, nats per token, [tokens]. Other arguments as in `forward_kl`.

    Args:
        name: a key of `DIVERGENCES`, or a function (see `find_divergence`).

    Raises:
        InputError: unknown name or option, or as `forward_kl`.
    """
    divergence_of = find_divergence(name, **options)
    if isinstance(teacher, SignalBatch) and isinstance(teacher.support, Sampled):
        check_sampled(name, temperature)
        check_fit(teacher.tokens, teacher.vocab_size, *student_logits.shape)
        assert teacher.ids is not None
        return sampled_forward_kl(teacher, log_probs(student_logits).gather(1, teacher.ids))
    log_p, log_q = outcomes(student_logits, teacher, temperature)
    return divergence_of(log_p, log_q, has_tail=isinstance(teacher, SignalBatch) and has_tail(teacher, log_p.shape[1]))


def find_divergence(name: str | Divergence, **options: float) -> Divergence:
    """Return `DIVERGENCES[name]`, or the given function, with `options` filled in.

    A user's function has the signature `fn(log_p, log_q, **options) -> Tensor`: the log-probs of teacher and student
    over the same outcomes, float32 [tokens, outcomes], the teacher's detached; the result is nats [tokens]. Outcomes
    are the whole vocabulary, or, for signals with ids, these ids and a last column with the mass of all other tokens. A
    function with a parameter `has_tail` receives True if there is such a column. Log-probs are at least `LOG_FLOOR`.
    The function is called on one chunk of tokens at a time, so the result at a token must depend on that token only.

    Raises:
        InputError: unknown name or option; the message suggests the closest one. For a function: an option that is not
            one of its parameters, or a result of another shape than [tokens].
    """
    if not isinstance(name, str):
        return _wrap_function(name, options)
    if name not in DIVERGENCES:
        raise InputError(f"There is no divergence '{name}'; did you mean '{_closest(name, list(DIVERGENCES))}'?")
    known = [option for option in inspect.signature(DIVERGENCES[name]).parameters if option not in _COMMON_ARGUMENTS]
    for option, value in options.items():
        if option not in known:
            hint = f"did you mean '{_closest(option, known)}'?" if known else "it has none."
            raise InputError(f"The divergence '{name}' has no option '{option}'; {hint}")
        if not 0.0 <= value <= 1.0:
            raise InputError(f"'{option}' of '{name}' is {value:g}; give a number from 0 to 1.")
    return partial(DIVERGENCES[name], **options)


def _wrap_function(function: Divergence, options: Mapping[str, float]) -> Divergence:
    """Wrap the user's `function`: fill in `options`, pass `has_tail` if it has this parameter, check its result."""
    label = getattr(function, "__name__", str(function))
    parameters = inspect.signature(function).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for option in options:
        if option not in parameters and not takes_any:
            raise InputError(f"The divergence '{label}' has no parameter '{option}'; remove it or add the parameter.")
    takes_tail = takes_any or "has_tail" in parameters

    def divergence_of_outcomes(log_p: Tensor, log_q: Tensor, *, has_tail: bool = False) -> Tensor:
        nats = function(log_p, log_q, **options, **({"has_tail": has_tail} if takes_tail else {}))
        if not isinstance(nats, Tensor) or nats.shape != log_q.shape[:1]:
            found = f"shape {list(nats.shape)}" if isinstance(nats, Tensor) else type(nats).__name__
            raise InputError(
                f"The divergence '{label}' must return one number per token, a tensor [tokens] of shape "
                f"[{len(log_q)}] here, but it returned {found}; sum over the last dimension only."
            )
        return nats

    return divergence_of_outcomes


def try_divergence(function: Divergence, **options: float) -> None:
    """Call the user's `function` once, on log-probs of 2 tokens and 128 outcomes.

    An error that may be due to these sizes is left to the run.

    Raises:
        InputError: the function does not take `(log_p, log_q)`, or its result has another shape than [tokens].
    """
    label = getattr(function, "__name__", str(function))
    log_p, log_q = torch.randn(2, 2, 128, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    try:
        find_divergence(function, **options)(log_p, log_q, has_tail=True)
    except InputError:
        raise
    except TypeError as error:
        raise InputError(f"The divergence '{label}' cannot be called with (log_p, log_q): {error}.") from error
    except Exception as error:  # the user's code raises anything
        logger.debug("The divergence '%s' failed on 128 outcomes: %s", label, error)


def outcomes(student_logits: Tensor, teacher: Teacher, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the floored log-probs of teacher and student over the same outcomes, [tokens, vocab] or [tokens, k + 1].

    The teacher's are detached. For signals with ids the last outcome is the tail bucket of all other tokens.
    """
    log_q = log_probs(student_logits, temperature)
    if isinstance(teacher, SignalBatch) and isinstance(teacher.support, Hidden):
        check_fit(teacher.tokens, teacher.vocab_size, *student_logits.shape)
        return hidden_outcomes(teacher, log_q, temperature)
    if isinstance(teacher, SignalBatch):
        log_p = signal_outcomes(teacher, student_logits.shape[1], len(student_logits), temperature)
        assert teacher.ids is not None
        chosen = log_q.gather(1, teacher.ids)
        tail = log_q.scatter(1, teacher.ids, EXCLUDED).logsumexp(dim=1, keepdim=True).clamp(min=LOG_FLOOR)
        return log_p, torch.cat([chosen, tail], dim=1)
    return log_probs(fit_teacher(teacher, *student_logits.shape), temperature), log_q


def log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return log softmax(logits / T) in at least float32, floored at LOG_FLOOR; [tokens, vocab]."""
    if not temperature > 0:
        raise InputError(f"The temperature is {temperature:g}; give a number above 0.")
    wide = upcast(logits)
    if temperature != 1.0:
        wide = wide / temperature
    return wide.log_softmax(dim=-1).clamp(min=LOG_FLOOR)


def signal_outcomes(signals: SignalBatch, vocab_size: int, tokens: int, temperature: float = 1.0) -> Tensor:
    """Return the teacher's floored log-probs of the signal's ids and the tail bucket, [tokens, k + 1].

    Raises:
        InputError: the signal does not fit the student's tokens or vocabulary, or lacks the temperature.
    """
    log_p, log_tail = signals.at_temperature(temperature)
    check_fit(signals.tokens, signals.vocab_size, tokens, vocab_size)
    if log_p.shape[1] == vocab_size:
        # The ids are the student's whole vocabulary, and the tail is the teacher's padding columns.
        log_p, log_tail = log_p - log_p.logsumexp(dim=1, keepdim=True), torch.full_like(log_tail, -torch.inf)
    return torch.cat([log_p, log_tail[:, None]], dim=1).detach().clamp(min=LOG_FLOOR)


def fit_teacher(logits: Tensor, tokens: int, vocab_size: int) -> Tensor:
    """Return the teacher's dense logits, detached, padded with -inf to the student's (larger) padded vocabulary."""
    check_fit(len(logits), logits.shape[1], tokens, vocab_size)
    missing = vocab_size - logits.shape[1]
    return F.pad(logits.detach(), (0, missing), value=-torch.inf) if missing else logits.detach()


def hidden_outcomes(signals: SignalBatch, log_q: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the floored log-probs of teacher and student over the tokens that both have, and, if the student has other
    columns (padding, or tokens that the teacher lacks), one tail of all other columns; [tokens, outcomes].

    Args:
        signals: signals with support `hidden`.
        log_q: the student's log-probs over all its columns, [tokens, columns].
    """
    shared, columns = signals.vocab_size, log_q.shape[1]
    if columns == shared:
        # The student cannot put probability elsewhere, so the teacher's is conditioned on the shared tokens.
        return log_probs(hidden_logits(signals), temperature), log_q
    log_p = log_probs(signals.logits().detach(), temperature)
    return split_tail(log_p, shared), split_tail(log_q, shared)


def hidden_logits(signals: SignalBatch) -> Tensor:
    """Return the logits of a `hidden` signal over the tokens that the student has too, detached."""
    return signals.logits().detach()[:, : signals.vocab_size]


def split_tail(log_probs: Tensor, shared: int) -> Tensor:
    """Return the first `shared` columns, and one column with the floored log of the others' total probability."""
    if log_probs.shape[1] == shared:
        tail = log_probs.new_full((len(log_probs), 1), LOG_FLOOR)
    else:
        tail = log_probs[:, shared:].logsumexp(dim=1, keepdim=True).clamp(min=LOG_FLOOR)
    return torch.cat([log_probs[:, :shared], tail], dim=1)


def has_tail(signals: SignalBatch, columns: int) -> bool:
    """Return whether the last of `columns` outcomes of a signal is the total of all other tokens."""
    return signals.ids is not None or columns > signals.vocab_size


def check_sampled(name: str | Divergence, temperature: float) -> None:
    """Raise InputError if a `sampled` signal cannot estimate the divergence without bias."""
    if name != "forward_kl" or temperature != 1.0:
        raise InputError(
            f"A 'sampled' signal estimates forward_kl at temperature 1 only, not {name} at {temperature:g}; request "
            "support 'hidden' (exact) or 'topk'."
        )


def sampled_forward_kl(signals: SignalBatch, log_q: Tensor) -> Tensor:
    """Return Σ w·(−log q) − H(p), an unbiased estimate of KL(p‖q) with unbiased gradient (arXiv 2503.16870).

    The estimate may be negative.

    Args:
        signals: signals with support `sampled`.
        log_q: the student's log-probs at the signal's ids, [tokens, k].
    """
    assert signals.weights is not None
    assert signals.entropies is not None
    return -(signals.weights * log_q).sum(dim=1) - signals.entropies


def check_fit(teacher_tokens: int, teacher_vocab: int, tokens: int, vocab_size: int) -> None:
    """Raise InputError if the teacher's shape does not fit the student's."""
    if teacher_tokens != tokens:
        raise InputError(
            f"The teacher's values are for {teacher_tokens} tokens but the student's for {tokens}; "
            "pass the same counted positions for both."
        )
    if teacher_vocab > vocab_size:
        raise InputError(
            f"The teacher's vocabulary has {teacher_vocab} tokens but the student's logits only {vocab_size} columns; "
            "use a student with the teacher's tokenizer, or remove the teacher's padding columns."
        )


# The definitions, on log-probs [tokens, outcomes]. With `has_tail` the last outcome is the tail bucket.


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
    both = (head_gap + tail_gap).clamp(min=torch.finfo(gap.dtype).tiny)  # equal distributions give 0, not 0/0
    difference = log_p - log_q
    return (head_gap * (p * difference).sum(dim=-1) - tail_gap * (q * difference).sum(dim=-1)) / both


def _log_mixture(difference: Tensor, share: float) -> Tensor:
    """Return log(share·a + (1 − share)·b) − log a from log b − log a, without cancellation near a = b."""
    own, other = torch.tensor([share, 1 - share], dtype=difference.dtype, device=difference.device).log()
    return torch.logaddexp(own, other + difference)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jensen_shannon": _jensen_shannon,
    "total_variation": _total_variation,
    "symmetric_kl": _symmetric_kl,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "adaptive_kl": _adaptive_kl,
}
"""The built-in divergences by name."""

_COMMON_ARGUMENTS = ("log_p", "log_q", "has_tail")


def _closest(word: str, words: Sequence[str]) -> str:
    return difflib.get_close_matches(word, words, n=1, cutoff=0.0)[0]
