"""Losses between models with different vocabularies."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rayk.config.support import Hidden, TopK
from rayk.errors import InputError
from rayk.losses.divergences import EXCLUDED, LOG_FLOOR, Divergence, find_divergence, log_probs
from rayk.losses.head_product import chunk_size
from rayk.losses.linear import linear_log_probs
from rayk.losses.logit_chunks import map_logits
from rayk.models import Head
from rayk.signals.alignment import TokenGroups, VocabularyMap
from rayk.signals.batch import SignalBatch

_SPAN_CEILING = -1e-6
"""Largest log-prob of a span, so that the log-prob of any other text stays finite."""
_NORMALIZER_ELEMENTS = 1 << 23


@dataclass(frozen=True)
class AlignedLoss:
    """The result of `aligned_divergence`; one value per counted token of the student, [tokens] each. A group's values
    are at its first token, all others are 0."""

    divergence: Tensor
    """Nats, with gradient."""
    unmatched: Tensor
    """Sorted distance of the probabilities of tokens without partner, in [0, 2], with gradient; 0 unless requested."""
    cross_entropy: Tensor
    """−log q of the student's own tokens at temperature 1, in nats, at every token."""
    is_aligned: Tensor
    """1 at tokens of a group."""
    is_compared: Tensor
    """1 at tokens whose distribution is compared with the teacher's."""


def universal_logit_distance(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Σ |sort↓(q) − sort↓(p)|, the smaller vocabulary padded with zeros (ULD, Boizard et al. 2024, arXiv 2402.12030).

    The distance compares the shapes of two distributions, not their tokens. Row i of the student is compared with row i
    of the teacher; the caller aligns both at the first answer token and truncates the longer answer. The paper adds 1.5
    times the mean of this distance to the cross-entropy.

    Args:
        student_logits: [tokens, vocab].
        teacher_logits: [tokens, teacher's vocab], of any size; detached.
        temperature: divides both sides' logits; 1 in the paper.

    Returns:
        A distance in [0, 2] per token (not nats), [tokens].

    Raises:
        InputError: the teacher is not a tensor of dense logits, or has another number of tokens.
    """
    if not isinstance(teacher_logits, Tensor) or len(teacher_logits) != len(student_logits):
        raise InputError(
            "universal_logit_distance needs the teacher's dense logits, one row for each of the student's; "
            "signals contain only part of the distribution."
        )
    q, p = log_probs(student_logits, temperature).exp(), log_probs(teacher_logits.detach(), temperature).exp()
    return sorted_distance(q, p)


def sorted_distance(q: Tensor, p: Tensor) -> Tensor:
    """Return Σ |sort↓(q) − sort↓(p)| of probabilities [tokens, any number each], the shorter rows padded with zeros."""
    q, p = (side.sort(dim=1, descending=True).values for side in (q, p))
    width = max(p.shape[1], q.shape[1])
    return (F.pad(q, (0, width - q.shape[1])) - F.pad(p, (0, width - p.shape[1]))).abs().sum(dim=1)


def aligned_divergence(
    student_hidden: Tensor,
    student_head: Head,
    teacher: SignalBatch,
    groups: TokenGroups,
    vocabulary: VocabularyMap,
    targets: Tensor,
    divergence: str | Divergence = "forward_kl",
    *,
    temperature: float = 1.0,
    unmatched: bool = False,
    chunk_tokens: int | None = None,
    **options: float,
) -> AlignedLoss:
    """Return the divergence from a teacher with another tokenizer, over groups of tokens that cover the same bytes.

    A group with one token on each side: p(S)·D(p(·|S) ‖ q(·|S)), where S are the tokens that both vocabularies contain.
    By the chain rule of forward KL this is the part of KL(p‖q) within S. If the vocabularies are equal, it is D(p‖q).
    With support `topk` the outcomes are, as without alignment, the teacher's ids (those in S) and all other tokens
    together. Any other group: D between the two outcomes "this text" and "any other text". The log-prob of a text is
    the sum over its tokens (ALM, Minixhofer et al. 2025, arXiv 2503.20083, §3).

    Args:
        student_hidden: [tokens, width], after the final norm, at the student's counted tokens.
        student_head: the student's head, hidden states to logits.
        teacher: signals with support `topk` or `hidden` at the teacher's counted tokens.
        groups: the groups, by counted index into both.
        vocabulary: the tokens that both vocabularies contain.
        targets: int64 [tokens], the student's counted tokens.
        divergence: a key of `DIVERGENCES`, or a function (see `find_divergence`).
        temperature: divides both sides' logits.
        unmatched: also compute the sorted distance of the probabilities outside S, at groups with one token on each
            side: exact with `hidden`; with `topk`, of the k largest of each side.
        chunk_tokens: positions in a chunk; by default chosen from the larger vocabulary.
        options: the options of the divergence (beta, alpha, ...).

    Raises:
        InputError: the support has neither ids with a tail nor hidden states; or the divergence or option is unknown.
    """
    if not isinstance(teacher.support, TopK | Hidden):
        raise InputError(
            f"Signals of support '{teacher.support.kind}' cannot be aligned with another tokenizer; use 'topk' or "
            "'hidden'."
        )
    divergence_of = find_divergence(divergence, **options)
    device = student_hidden.device
    student_spans, teacher_spans = torch.from_numpy(groups.student), torch.from_numpy(groups.teacher)
    is_single = torch.from_numpy(groups.is_single)
    single, teacher_single = (spans[is_single, 0].to(device) for spans in (student_spans, teacher_spans))
    at_singles = _compare_singles(
        student_hidden[single], student_head, teacher.select_tokens(teacher_single), targets[single],
        _SharedIds.of(vocabulary, student_head, teacher, device), divergence_of, temperature, unmatched, chunk_tokens,
    )  # fmt: skip

    is_other = torch.ones(len(targets), dtype=torch.bool, device=device)
    is_other[single] = False
    others = is_other.nonzero()[:, 0]
    log_q, others_log_q = _target_log_probs(
        student_hidden[others], student_head, targets[others], temperature, chunk_tokens
    )
    place = torch.full_like(targets, -1)
    place[others] = torch.arange(len(others), device=device)
    spans, span_group = _expand(student_spans[~is_single], device)
    teacher_tokens, teacher_group = _expand(teacher_spans[~is_single], device)
    log_p = _teacher_target_log_probs(teacher.select_tokens(teacher_tokens), temperature)
    count = int((~is_single).sum())
    at_spans = _compare_spans(
        log_p.new_zeros(count).index_add(0, teacher_group, log_p),
        log_q.new_zeros(count).index_add(0, span_group, log_q[place[spans]]),
        divergence_of,
    )

    def scatter(places: Tensor, values: Tensor) -> Tensor:
        return values.new_zeros(len(targets)).index_put((places,), values)

    first = student_spans[~is_single, 0].to(device)
    ones = torch.ones_like(at_singles.divergence).detach()
    return AlignedLoss(
        divergence=scatter(torch.cat([single, first]), torch.cat([at_singles.divergence, at_spans])),
        unmatched=scatter(single, at_singles.unmatched),
        cross_entropy=scatter(torch.cat([single, others]), torch.cat([at_singles.cross_entropy, -others_log_q])),
        is_aligned=scatter(torch.cat([single, spans]), torch.cat([ones, torch.ones_like(spans, dtype=ones.dtype)])),
        is_compared=scatter(single, ones),
    )


@dataclass(frozen=True)
class _SharedIds:
    """The shared tokens as tensors, and the tokens that only one of the vocabularies contains."""

    student: Tensor
    teacher: Tensor
    place_of_teacher: Tensor
    """int64 [teacher's vocabulary], the place of a token in `teacher`, or the number of shared tokens without one."""
    only_student: Tensor
    only_teacher: Tensor

    @classmethod
    def of(
        cls, vocabulary: VocabularyMap, student_head: Head, signals: SignalBatch, device: torch.device
    ) -> "_SharedIds":
        student, teacher = torch.from_numpy(vocabulary.student), torch.from_numpy(vocabulary.teacher)
        # Tokenizers may have ids beyond the model's embeddings.
        student_size = min(vocabulary.student_size, student_head.vocab_size)
        teacher_size = min(vocabulary.teacher_size, signals.vocab_size)
        exists = (student < student_size) & (teacher < teacher_size)
        student, teacher = student[exists], teacher[exists]
        place = torch.full((signals.vocab_size,), len(teacher))
        place[teacher] = torch.arange(len(teacher))
        is_only_student = torch.ones(student_size, dtype=torch.bool)
        is_only_student[student] = False
        parts = student, teacher, place, is_only_student.nonzero()[:, 0], (place == len(teacher)).nonzero()[:, 0]
        return cls(*(part.to(device) for part in parts))


@dataclass(frozen=True)
class _Singles:
    divergence: Tensor
    unmatched: Tensor
    cross_entropy: Tensor


def _compare_singles(
    hidden: Tensor, head: Head, teacher: SignalBatch, targets: Tensor, ids: _SharedIds, divergence_of: Divergence,
    temperature: float, unmatched: bool, chunk_tokens: int | None,
) -> _Singles:  # fmt: skip
    """Compare the distributions at positions [tokens] at which both sides predict one token of the same text."""

    def compare_chunk(
        logits: Tensor, signals: SignalBatch, chunk_targets: Tensor
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        compare = _compare_topk if signals.hidden is None else _compare_hidden
        distance, unshared = compare(logits, signals, ids, divergence_of, temperature, unmatched)
        return (distance, unshared, -log_probs(logits).gather(1, chunk_targets[:, None])[:, 0]), {}

    size = chunk_size(hidden, head, chunk_tokens)
    if teacher.head is not None:
        size = max(1, size * head.vocab_size // max(head.vocab_size, teacher.head.vocab_size))
    losses, _ = map_logits(compare_chunk, hidden, head, teacher, targets, size, store=not unmatched)
    return _Singles(*losses)


def _compare_hidden(
    logits: Tensor, teacher: SignalBatch, ids: _SharedIds, divergence_of: Divergence, temperature: float,
    unmatched: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return p(S)·D(p(·|S) ‖ q(·|S)) from the teacher's hidden states, and the distance outside S, [tokens] each."""
    with torch.no_grad():
        log_p_all = log_probs(teacher.logits()[:, : len(ids.place_of_teacher)], temperature)
        log_p = log_p_all[:, ids.teacher]
        mass = log_p.logsumexp(dim=1, keepdim=True)
    log_q = log_probs(logits[:, ids.student], temperature)
    distance = mass[:, 0].exp() * divergence_of((log_p - mass).clamp(min=LOG_FLOOR), log_q)
    if not unmatched:
        return distance, torch.zeros_like(distance)
    q = log_probs(logits, temperature)[:, ids.only_student].exp()
    return distance, sorted_distance(q, log_p_all[:, ids.only_teacher].exp())


def _compare_topk(
    logits: Tensor, teacher: SignalBatch, ids: _SharedIds, divergence_of: Divergence, temperature: float,
    unmatched: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Like `_compare_hidden`, from the teacher's k likeliest tokens; its tail counts as part of S."""
    assert teacher.ids is not None
    with torch.no_grad():
        log_p_ids, log_tail = teacher.at_temperature(temperature)
        place = ids.place_of_teacher[teacher.ids]
        is_shared = place < len(ids.teacher)
        shared_log_p = torch.where(is_shared, log_p_ids, EXCLUDED)
        log_p = torch.cat([shared_log_p, log_tail[:, None]], dim=1).clamp(min=EXCLUDED)
        mass = log_p.logsumexp(dim=1, keepdim=True)
        log_p = (log_p - mass).clamp(min=LOG_FLOOR)
    # The last column stands for ids outside S: it has no probability.
    log_q = F.pad(log_probs(logits[:, ids.student], temperature), (0, 1), value=EXCLUDED)
    rest = log_q.scatter(1, place, EXCLUDED).logsumexp(dim=1, keepdim=True)
    outcomes = torch.cat([log_q.gather(1, place), rest], dim=1).clamp(min=LOG_FLOOR)
    distance = mass[:, 0].exp() * divergence_of(log_p, outcomes, has_tail=True)
    if not unmatched:
        return distance, torch.zeros_like(distance)
    q = log_probs(logits, temperature)[:, ids.only_student].exp()
    largest = q.topk(min(q.shape[1], teacher.ids.shape[1]), dim=1).values
    return distance, sorted_distance(largest, torch.where(is_shared, -torch.inf, log_p_ids).exp())


def _compare_spans(log_p: Tensor, log_q: Tensor, divergence_of: Divergence) -> Tensor:
    """Return D between the outcomes "this text" and "any other text", from the log-probs of texts, [texts] each."""
    sides = []
    for log_prob in (log_p, log_q):
        this = log_prob.clamp(min=LOG_FLOOR, max=_SPAN_CEILING)
        other = torch.where(this > -0.7, (-this.expm1()).log(), (-this.exp()).log1p())
        sides.append(torch.stack([this, other], dim=1))
    return divergence_of(*sides)


def _target_log_probs(
    hidden: Tensor, head: Head, targets: Tensor, temperature: float, chunk_tokens: int | None
) -> tuple[Tensor, Tensor]:
    """Return log q of the targets at `temperature` and at 1, [tokens] each."""
    ids = targets[:, None] if temperature != 1.0 else targets.new_zeros(len(targets), 0)
    at_temperature, _, log_q = linear_log_probs(hidden, head, ids, targets, temperature, chunk_tokens)
    assert log_q is not None
    return (log_q if temperature == 1.0 else at_temperature[:, 0]), log_q


@torch.no_grad()
def _teacher_target_log_probs(teacher: SignalBatch, temperature: float) -> Tensor:
    """Return log p of the teacher's own tokens at `temperature`, [tokens]."""
    if temperature == 1.0:
        return teacher.target_logprobs
    if isinstance(teacher.support, TopK):
        assert teacher.logprobs is not None and teacher.log_tails is not None
        tail = teacher.log_tails[:, teacher.support.temperatures.index(temperature)]
        normalizer = torch.cat([teacher.logprobs / temperature, tail[:, None]], dim=1).logsumexp(dim=1)
    else:
        size = max(1, _NORMALIZER_ELEMENTS // max(teacher.vocab_size, 1))
        parts = [teacher.slice_tokens(slice(start, start + size)) for start in range(0, max(teacher.tokens, 1), size)]
        normalizer = torch.cat(
            [(part.logits()[:, : part.vocab_size].log_softmax(1) / temperature).logsumexp(1) for part in parts]
        )
    return teacher.target_logprobs / temperature - normalizer


def _expand(spans: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return all positions in `spans` [spans, 2] (first and end), and the span's number of each."""
    lengths = spans[:, 1] - spans[:, 0]
    group = torch.arange(len(spans)).repeat_interleave(lengths)
    within = torch.arange(len(group)) - (lengths.cumsum(0) - lengths)[group]
    return (spans[group, 0] + within).to(device), group.to(device)
