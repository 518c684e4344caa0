"""Overlap, disagreement and entropies are those of the dense distributions, whatever a signal contains of them."""

from dataclasses import replace

import pytest
import torch
from loss_cases import random_head, random_logits, signals_of

from rayk import losses
from rayk.config.support import Hidden, Requested, Sampled
from rayk.losses.chunked import Match
from rayk.models import Head
from rayk.signals.batch import SignalBatch

N, D, V, K = 9, 5, 23, 3
TARGETS = torch.arange(N) * 2


def student():
    hidden, head = random_logits(N, D, dtype=torch.float64), random_head(V, D, 1)
    return hidden, head, hidden @ head.weight.detach().t()


def hidden_signals():
    states = (random_logits(N, D) + random_logits(N, D, 2, scale=1.5)).float()
    head = Head(random_head(V, D, 1).weight.detach().float())
    logits = head.logits(states).double()
    log_p = logits.log_softmax(1).gather(1, TARGETS[:, None])[:, 0]
    return SignalBatch(Hidden("float32"), torch.tensor([0, N]), log_p, V, hidden=states, head=head), logits


def near_logits():
    """Logits of a teacher that is not far from the student, [tokens, vocab]."""
    return student()[2] + random_logits(N, V, 2, scale=5.0)


def dense_overlap(p_logits, q_logits):
    """The shares of equal ids among the K most likely ones, and whether the most likely ones differ."""
    likeliest = [logits.topk(K).indices.tolist() for logits in (p_logits, q_logits)]
    pairs = list(zip(*likeliest, strict=True))
    shares = [len(set(p) & set(q)) / K for p, q in pairs]
    return torch.tensor(shares).double(), torch.tensor([float(p[0] != q[0]) for p, q in pairs]).double()


def entropy(logits, ids=None):
    log_p = logits.log_softmax(1)
    if ids is not None:
        rest = log_p.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
        log_p = torch.cat([log_p.gather(1, ids), rest], dim=1)
    return torch.distributions.Categorical(logits=log_p).entropy()


def match(teacher, compared=K, divergence="reverse_kl") -> Match:
    hidden, head, _ = student()
    return losses.linear_match(
        hidden, head, teacher, divergence, targets=TARGETS, compared=compared, chunk_tokens=4
    )  # fmt: skip


def assert_dense(terms, p_logits, ids=None):
    q_logits = student()[2]
    overlap, disagreement = dense_overlap(p_logits, q_logits)
    assert 0 < overlap.mean() < 1 and 0 < disagreement.mean() < 1
    torch.testing.assert_close(terms["overlap"].double(), overlap)
    torch.testing.assert_close(terms["disagreement"].double(), disagreement)
    torch.testing.assert_close(terms["teacher_entropy"].double(), entropy(p_logits, ids), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(terms["student_entropy"].double(), entropy(q_logits, ids), atol=1e-5, rtol=1e-5)


def test_hidden_states_give_the_exact_values():
    signals, logits = hidden_signals()
    assert_dense(match(signals).terms, logits)


@pytest.mark.parametrize("k", [K, 7])
def test_top_k_signals_give_exact_overlap_and_entropies_over_their_outcomes(k):
    logits = near_logits()
    signals = signals_of(logits, k, TARGETS)
    terms = match(signals).terms
    assert_dense(terms, logits, signals.ids)
    masses = [each.softmax(1).gather(1, signals.ids).sum(1) for each in (logits, student()[2])]
    torch.testing.assert_close([terms["teacher_mass"], terms["student_mass"]], masses)


def test_requested_ids_come_first_and_count_as_the_others():
    logits = near_logits()
    asked = student()[2].topk(4).indices
    own = logits.scatter(1, asked, -torch.inf).topk(K).indices
    signals = signals_of(logits, 0, TARGETS, ids=torch.cat([asked, own], dim=1))
    assert_dense(match(replace(signals, support=Requested(K))).terms, logits, signals.ids)


def test_decoupled_losses_compare_too():
    hidden, head, _ = student()
    for signals, logits in (hidden_signals(), (signals_of(teacher := random_logits(N, V, 2), 7, TARGETS), teacher)):
        found = losses.linear_decoupled_terms(hidden, head, signals, TARGETS, compared=K, chunk_tokens=4).comparison
        overlap, disagreement = dense_overlap(logits, student()[2])
        torch.testing.assert_close(found["overlap"].double(), overlap)
        torch.testing.assert_close(found["disagreement"].double(), disagreement)


def test_a_student_equal_to_its_teacher_overlaps_completely():
    terms = match(signals_of(student()[2], K, TARGETS)).terms
    assert terms["overlap"].min() == 1 and terms["disagreement"].max() == 0


def test_comparing_changes_neither_loss_nor_gradients_and_draws_have_the_entropy_alone():
    for signals in (hidden_signals()[0], signals_of(random_logits(N, V, 2), 7, TARGETS)):
        hidden, head, _ = student()
        inputs = [hidden.requires_grad_(), head.weight]
        found = []
        for compared in (0, K):
            one = losses.linear_match(
                hidden, head, signals, "jensen_shannon", targets=TARGETS, compared=compared, chunk_tokens=4
            )
            assert one.cross_entropy is not None and ("overlap" in one.terms) == bool(compared)
            assert not any(term.requires_grad for term in one.terms.values())
            loss = one.divergence.sum() + one.cross_entropy.sum()
            found.append([loss, *torch.autograd.grad(loss, inputs)])
        for plain, beside in zip(*found, strict=True):
            assert torch.equal(plain, beside)
    drawn = SignalBatch(
        Sampled(2), torch.tensor([0, N]), torch.zeros(N), V, ids=torch.arange(2).repeat(N, 1),
        weights=torch.full((N, 2), 0.5), entropies=torch.rand(N),
    )  # fmt: skip
    terms = match(drawn, divergence="forward_kl").terms
    assert list(terms) == ["teacher_entropy"] and torch.equal(terms["teacher_entropy"], drawn.entropies)
