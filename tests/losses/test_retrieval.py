"""The retriever's losses equal loops over the papers' sums; excluded pairs are no negatives."""

import math

import pytest
import torch
from torch.nn import functional as F

from rayk.losses import full_contrastive_loss, no_negatives, reward_distillation

TEMPERATURE = 0.3


@pytest.fixture
def batch():
    """Unit vectors of 5 queries and 3 passages each, and rewards; float64."""
    torch.manual_seed(3)
    queries = F.normalize(torch.randn(5, 4, dtype=torch.float64), dim=-1)
    passages = F.normalize(torch.randn(5, 3, 4, dtype=torch.float64), dim=-1)
    return queries, passages, 2 * torch.randn(5, 3, dtype=torch.float64)


def summed(queries, passages, excluded):
    """The contrastive loss as the paper writes it, pair by pair."""
    losses = []
    for i, query in enumerate(queries):
        positive = passages[i, 0]
        terms = []
        for j, other in enumerate(queries):
            for p, passage in enumerate(passages[j]):
                if (i, p) == (j, 0) or not excluded[i, 3 * j + p]:
                    terms.append(query @ passage)
            if i == j:
                continue
            if not excluded[i, 15 + j]:
                terms += [positive @ other, query @ other]
            if not excluded[i, 3 * j]:
                terms.append(positive @ passages[j, 0])
        total = sum(math.exp(term / TEMPERATURE) for term in terms)
        losses.append(math.log(total) - float(query @ positive) / TEMPERATURE)
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_the_contrastive_loss_is_the_papers_sum_over_what_is_not_excluded(share, batch):
    queries, passages, _ = batch
    excluded = torch.rand(5, 20) < share
    loss = full_contrastive_loss(queries, passages, TEMPERATURE, excluded if share else None)
    torch.testing.assert_close(loss, summed(queries, passages, excluded))
    torch.testing.assert_close(full_contrastive_loss(queries, passages, TEMPERATURE, excluded), loss)


def test_distillation_is_the_kl_from_rewards_and_nothing_where_they_agree(batch):
    queries, passages, rewards = batch
    p = rewards.softmax(1)
    q = torch.stack([passages[i] @ query for i, query in enumerate(queries)]).div(TEMPERATURE).softmax(1)
    expected = (p * (p / q).log()).sum(1)
    torch.testing.assert_close(reward_distillation(queries, passages, rewards, TEMPERATURE), expected)
    own = torch.einsum("qw,qpw->qp", queries, passages) / TEMPERATURE + 7.0
    assert reward_distillation(queries, passages, own, TEMPERATURE).abs().max() < 1e-12
    refused = torch.tensor([[-0.5, -100.0, -100.0]], dtype=torch.float64)
    alone = reward_distillation(queries[:1], passages[:1], refused, TEMPERATURE)
    torch.testing.assert_close(alone, -q[:1, 0].log())


def test_gradients_are_those_of_finite_differences(batch):
    queries, passages, rewards = (each.requires_grad_() for each in batch)
    excluded = torch.rand(5, 20) < 0.3

    def loss(q, k):
        distilled = reward_distillation(q, k, rewards.detach(), TEMPERATURE)
        return (distilled + 0.2 * full_contrastive_loss(q, k, TEMPERATURE, excluded)).sum()

    assert torch.autograd.gradcheck(loss, (queries, passages))


def test_own_rows_positives_and_equal_labels_are_no_negatives():
    # Query 0 (row 10, label 1), 1 (row 11, no label), 2 (row 12, label 1); two passages each.
    query_rows, query_labels = torch.tensor([10, 11, 12]), torch.tensor([1, -1, 1])
    passage_rows = torch.tensor([[20, 21], [22, 10], [20, 23]])
    passage_labels = torch.tensor([[1, 0], [-1, -1], [0, 1]])
    excluded = no_negatives(query_rows, query_labels, passage_rows, passage_labels)
    expected = {
        0: {0, 3, 4, 5, 6, 8},  # its positive, its own row as a passage, row 20 again, label 1 three times
        1: {2, 7},  # no label is like no other
        2: {0, 4, 5, 6, 8},
    }
    assert {i: set(row.nonzero().flatten().tolist()) for i, row in enumerate(excluded)} == expected


def test_excluded_pairs_are_not_pushed_away(batch):
    queries, passages, _ = batch
    excluded = torch.zeros(5, 20, dtype=torch.bool)
    excluded[:, 7] = True  # the second passage of query 2
    passages.requires_grad_()
    full_contrastive_loss(queries, passages, TEMPERATURE, excluded).sum().backward()
    assert passages.grad[2, 1].abs().max() == 0
    assert (passages.grad[2, 2].abs().max() > 0) and (passages.grad[:, 0].abs().amax(1) > 0).all()


def test_single_query_is_compared_with_its_own_passages_only(batch):
    queries, passages, _ = batch
    loss = full_contrastive_loss(queries[:1], passages[:1], TEMPERATURE)
    torch.testing.assert_close(loss, -(passages[0] @ queries[0] / TEMPERATURE).log_softmax(0)[:1])
