"""The divergence from a teacher with another tokenizer: equal to the plain one for one vocabulary, and to its dense
definition for two."""

import numpy as np
import pytest
import torch
from loss_cases import random_head, random_logits, signals_of

from rayk.config.support import Hidden, Logprob
from rayk.errors import InputError
from rayk.losses import DIVERGENCES, aligned_divergence, linear_divergence
from rayk.losses.divergences import LOG_FLOOR, find_divergence
from rayk.models import Head
from rayk.signals.alignment import TokenGroups, VocabularyMap
from rayk.signals.batch import SignalBatch

VOCAB, WIDTH, TOKENS = 24, 6, 9
TARGETS = torch.arange(TOKENS) * 5 % VOCAB


def hidden_signals(logits: torch.Tensor, targets: torch.Tensor) -> SignalBatch:
    """Signals of a teacher whose hidden states are its logits."""
    target_logprobs = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    return SignalBatch(
        Hidden("float32"), torch.tensor([0, len(logits)]), target_logprobs, logits.shape[1], hidden=logits,
        head=Head(torch.eye(logits.shape[1], dtype=logits.dtype)),
    )  # fmt: skip


def identical(tokens: int = TOKENS, vocab: int = VOCAB) -> tuple[TokenGroups, VocabularyMap]:
    spans = np.stack([np.arange(tokens), np.arange(tokens) + 1], axis=1)
    ids = np.arange(vocab)
    return TokenGroups(spans, spans, np.ones(tokens, bool)), VocabularyMap(ids, ids, vocab, vocab)


# Student tokens 0 1 | 2 | 3 | 4 5 | 6 and two more outside any group; teacher tokens 0 | 1 | 2 3 | 4 | 5.
GROUPS = TokenGroups(
    np.array([[0, 2], [2, 3], [3, 4], [4, 6], [6, 7]]), np.array([[0, 1], [1, 2], [2, 4], [4, 5], [5, 6]]),
    np.array([False, True, False, False, True]),
)  # fmt: skip
TEACHER_VOCAB, TEACHER_TOKENS = 31, 6
SHARED = VocabularyMap(np.arange(0, 20), np.arange(29, 9, -1), VOCAB, TEACHER_VOCAB)
TEACHER_TARGETS = torch.arange(TEACHER_TOKENS) * 7 % TEACHER_VOCAB


@pytest.fixture
def hidden():
    return random_logits(TOKENS, WIDTH, 3).requires_grad_()


@pytest.fixture
def head():
    return random_head(VOCAB, WIDTH, 4)


def expected_divergence(logits, teacher_logits, name, temperature=1.0, mass_of=None):
    """The dense definition, [tokens]; `mass_of` limits the teacher's outcomes to (ids, tail) per position."""
    divergence = find_divergence(name)
    log_q, log_p = (side.div(temperature).log_softmax(1) for side in (logits, teacher_logits))
    expected = torch.zeros(len(logits), dtype=torch.float64)
    for student, teacher, single in zip(GROUPS.student, GROUPS.teacher, GROUPS.is_single, strict=True):
        if single:
            p = log_p[teacher[0], torch.from_numpy(SHARED.teacher)]
            q = log_q[student[0], torch.from_numpy(SHARED.student)]
            mass = p.logsumexp(0)
            expected[student[0]] = mass.exp() * divergence((p - mass)[None], (q - q.logsumexp(0))[None])[0]
        else:
            sides = []
            for rows, targets, (first, end) in ((log_p, TEACHER_TARGETS, teacher), (log_q, TARGETS, student)):
                span = rows[torch.arange(first, end), targets[first:end]].sum().exp()
                sides.append(torch.stack([span, 1 - span]).log()[None])
            expected[student[0]] = divergence(*sides)[0]
    return expected


@pytest.mark.parametrize("support", ["topk", "hidden"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_one_vocabulary_gives_the_plain_loss_and_gradient(name, support, hidden, head):
    teacher_logits = random_logits(TOKENS, VOCAB, 1)
    signals = signals_of(teacher_logits, 5, TARGETS, (1.0, 2.0))
    if support == "hidden":
        signals = hidden_signals(teacher_logits, TARGETS)
    for temperature in (1.0, 2.0):
        plain, cross_entropy = linear_divergence(hidden, head, signals, name, temperature=temperature, targets=TARGETS)
        loss = aligned_divergence(
            hidden, head, signals, *identical(), TARGETS, name, temperature=temperature, unmatched=True
        )
        torch.testing.assert_close(loss.divergence, plain, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(loss.cross_entropy, cross_entropy, atol=1e-6, rtol=1e-6)
        assert not loss.unmatched.any() and loss.is_aligned.all() and loss.is_compared.all()
        inputs = (hidden, head.weight)
        for own, its in zip(
            torch.autograd.grad(loss.divergence.sum(), inputs), torch.autograd.grad(plain.sum(), inputs), strict=True
        ):
            torch.testing.assert_close(own, its, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_two_vocabularies_give_the_dense_definition(name, temperature, hidden, head):
    teacher_logits = random_logits(TEACHER_TOKENS, TEACHER_VOCAB, 1)
    signals = hidden_signals(teacher_logits, TEACHER_TARGETS)
    loss = aligned_divergence(
        hidden, head, signals, GROUPS, SHARED, TARGETS, name, temperature=temperature, unmatched=True
    )
    logits = head.logits(hidden.float()).double() if hidden.dtype != torch.float64 else hidden @ head.weight.T
    expected = expected_divergence(logits, teacher_logits, name, temperature)
    torch.testing.assert_close(loss.divergence, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss.cross_entropy, -logits.log_softmax(1).gather(1, TARGETS[:, None])[:, 0])
    assert loss.is_aligned.tolist() == [1] * 7 + [0] * 2
    assert loss.is_compared.tolist() == [0, 0, 1, 0, 0, 0, 1, 0, 0]
    q = (logits[[2, 6]] / temperature).softmax(1)[:, 20:].sort(1, descending=True).values
    only = [i for i in range(TEACHER_VOCAB) if i not in SHARED.teacher]
    p = (teacher_logits[[1, 5]] / temperature).softmax(1)[:, only].sort(1, descending=True).values
    distance = (torch.nn.functional.pad(q, (0, p.shape[1] - q.shape[1])) - p).abs().sum(1)
    torch.testing.assert_close(loss.unmatched[[2, 6]], distance, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_topk_of_all_tokens_equals_hidden(temperature, hidden, head):
    teacher_logits = random_logits(TEACHER_TOKENS, TEACHER_VOCAB, 1)
    both = [
        aligned_divergence(
            hidden, head, signals, GROUPS, SHARED, TARGETS, temperature=temperature, unmatched=True
        )
        for signals in (
            signals_of(teacher_logits, TEACHER_VOCAB, TEACHER_TARGETS, (1.0, 1.5)),
            hidden_signals(teacher_logits, TEACHER_TARGETS),
        )
    ]  # fmt: skip
    torch.testing.assert_close(both[0].divergence, both[1].divergence, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both[0].unmatched, both[1].unmatched, atol=1e-6, rtol=1e-5)


def test_gradients_agree_with_finite_differences_and_chunks_change_nothing(hidden, head):
    signals = signals_of(random_logits(TEACHER_TOKENS, TEACHER_VOCAB, 1), 7, TEACHER_TARGETS)

    def loss(states, weight, chunk=None):
        result = aligned_divergence(
            states, Head(weight), signals, GROUPS, SHARED, TARGETS, "reverse_kl", unmatched=True, chunk_tokens=chunk
        )
        return result.divergence + result.unmatched + result.cross_entropy

    assert torch.autograd.gradcheck(loss, (hidden, head.weight))
    torch.testing.assert_close(loss(hidden, head.weight, 1), loss(hidden, head.weight), atol=1e-12, rtol=1e-12)


def test_teacher_equal_to_the_student_on_shared_tokens_costs_nothing(hidden, head):
    teacher_logits = torch.full((TEACHER_TOKENS, TEACHER_VOCAB), -3.0, dtype=torch.float64)
    logits = (hidden @ head.weight.T).detach()
    for student, teacher in ((2, 1), (6, 5)):
        teacher_logits[teacher, torch.from_numpy(SHARED.teacher)] = logits[student, torch.from_numpy(SHARED.student)]
    signals = hidden_signals(teacher_logits, TEACHER_TARGETS)
    loss = aligned_divergence(hidden, head, signals, GROUPS, SHARED, TARGETS)
    torch.testing.assert_close(loss.divergence[[2, 6]], torch.zeros(2, dtype=torch.float64), atol=1e-6, rtol=0)


def test_rows_without_groups_and_ids_beyond_the_models_embeddings_are_left_out(hidden, head):
    none = TokenGroups(np.zeros((0, 2), int), np.zeros((0, 2), int), np.zeros(0, bool))
    signals = signals_of(random_logits(TEACHER_TOKENS, TEACHER_VOCAB, 1), 7, TEACHER_TARGETS)
    loss = aligned_divergence(hidden, head, signals, none, SHARED, TARGETS, unmatched=True)
    assert not loss.divergence.any() and loss.divergence.requires_grad and loss.cross_entropy.all()
    beyond = VocabularyMap(
        np.append(SHARED.student, VOCAB + 3), np.append(SHARED.teacher, 30), VOCAB + 4, TEACHER_VOCAB
    )
    with_beyond = aligned_divergence(hidden, head, signals, GROUPS, beyond, TARGETS, unmatched=True)
    without = aligned_divergence(hidden, head, signals, GROUPS, SHARED, TARGETS, unmatched=True)
    torch.testing.assert_close(with_beyond.divergence, without.divergence)


def test_impossible_and_certain_spans_have_finite_losses_and_gradients(hidden, head):
    logits = torch.full((TEACHER_TOKENS, TEACHER_VOCAB), -torch.inf, dtype=torch.float64)
    logits[torch.arange(TEACHER_TOKENS), TEACHER_TARGETS] = 0.0
    certain = signals_of(logits.clamp(min=LOG_FLOOR), 7, TEACHER_TARGETS)
    for name in DIVERGENCES:
        loss = aligned_divergence(hidden * 40, head, certain, GROUPS, SHARED, TARGETS, name).divergence
        (slope,) = torch.autograd.grad(loss.sum(), hidden)
        assert loss.isfinite().all() and slope.isfinite().all()


def test_other_supports_are_refused(hidden, head):
    signals = SignalBatch(Logprob(), torch.tensor([0, TEACHER_TOKENS]), torch.zeros(TEACHER_TOKENS), TEACHER_VOCAB)
    with pytest.raises(InputError, match="'logprob' cannot be aligned.*use 'topk' or 'hidden'"):
        aligned_divergence(hidden, head, signals, GROUPS, SHARED, TARGETS)
