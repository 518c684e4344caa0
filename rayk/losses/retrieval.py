"""Losses that teach a retriever which demonstrations help a model (LLM-R, arXiv 2307.07164; microsoft/LMOps
`llm_retriever`).

With unit vectors q_i of queries and k_ij of their passages, of which k_i1 is the positive:

    L = KL(softmax_j r_ij ‖ softmax_j q_i·k_ij/τ) + w·L_cont

r are rewards: a reward model's, or the LLM's own scores. L_cont is −log softmax of q_i·k_i1/τ over everything that
anything in the batch could be taken for: query and all keys, the positive and all other queries, the query and all
other queries, the positive and all other positives, in one softmax.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from rayk.losses.divergences import forward_kl


def reward_distillation(queries: Tensor, passages: Tensor, rewards: Tensor, temperature: float) -> Tensor:
    """KL(softmax(rewards) ‖ softmax(cosines / temperature)) over each query's own passages, nats, [queries].

    Args:
        queries: unit vectors [queries, width].
        passages: unit vectors [queries, passages, width].
        rewards: [queries, passages], detached.
    """
    return forward_kl(torch.einsum("qw,qpw->qp", queries, passages) / temperature, rewards)


def full_contrastive_loss(
    queries: Tensor, passages: Tensor, temperature: float, excluded: Tensor | None = None
) -> Tensor:
    """−log of the share of q·k₁ among all pairs of the batch, nats, [queries].

    Args:
        queries: unit vectors [queries, width].
        passages: unit vectors [queries, passages, width], each query's positive first.
        excluded: bool [queries, queries·passages + queries]: what of all keys (passage after passage), and then of all
            queries, is no negative for a query. Another query's positive is one where its key is. A query's own
            positive always counts, the query itself never.
    """
    count, each, _ = passages.shape
    keys = passages.flatten(0, 1)
    positives = passages[:, 0]
    own = torch.eye(count, dtype=torch.bool, device=queries.device)
    of_keys = torch.zeros(count, count * each, dtype=torch.bool, device=queries.device)
    of_queries = own
    if excluded is not None:
        of_keys, of_queries = excluded[:, : count * each].clone(), excluded[:, count * each :] | own
    of_positives = of_keys[:, ::each] | own
    places = torch.arange(count, device=queries.device) * each
    of_keys.scatter_(1, places[:, None], False)
    similar = torch.cat([queries @ keys.T, positives @ queries.T, queries @ queries.T, positives @ positives.T], dim=1)
    no_negative = torch.cat([of_keys, of_queries, of_queries, of_positives], dim=1)
    return F.cross_entropy((similar / temperature).masked_fill(no_negative, -torch.inf), places, reduction="none")


def no_negatives(query_rows: Tensor, query_labels: Tensor, passage_rows: Tensor, passage_labels: Tensor) -> Tensor:
    """What `full_contrastive_loss` must not push a query away from, bool [queries, queries·passages + queries]: its own
    row and its positive's, wherever they stand, and whatever has the label of the query.

    Args:
        query_rows: int64 [queries]; equal numbers are the same row.
        query_labels: int64 [queries]; equal numbers are the same label of the same task, -1 is none.
        passage_rows: int64 [queries, passages], each query's positive first.
        passage_labels: likewise.
    """
    rows = torch.cat([passage_rows.flatten(), query_rows])
    labels = torch.cat([passage_labels.flatten(), query_labels])
    same_label = (labels == query_labels[:, None]) & (labels >= 0)
    return same_label | (rows == query_rows[:, None]) | (rows == passage_rows[:, :1])
