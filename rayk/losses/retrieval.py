"""Losses that train a retriever to find demonstrations that help a model (LLM-R, arXiv 2307.07164; microsoft/LMOps
`llm_retriever`).

With unit vectors q_i of the queries and k_ij of their passages, where k_i1 is the positive:

    L = KL(softmax_j r_ij ‖ softmax_j q_i·k_ij/τ) + w·L_cont

r are rewards from a reward model, or the LLM's scores. L_cont is −log of the share of q_i·k_i1/τ in one softmax over
four groups of pairs in the batch: the query with all keys, the positive with all other queries, the query with all
other queries, and the positive with all other positives.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from rayk.losses.divergences import forward_kl


def reward_distillation(queries: Tensor, passages: Tensor, rewards: Tensor, temperature: float) -> Tensor:
    """Return KL(softmax(rewards) ‖ softmax(cosines / temperature)) over the passages of each query, nats [queries].

    Args:
        queries: unit vectors [queries, width].
        passages: unit vectors [queries, passages, width].
        rewards: [queries, passages], detached.
    """
    return forward_kl(torch.einsum("qw,qpw->qp", queries, passages) / temperature, rewards)


def full_contrastive_loss(
    queries: Tensor, passages: Tensor, temperature: float, excluded: Tensor | None = None
) -> Tensor:
    """Return L_cont, −log softmax of q·k₁/τ over the pairs of the batch, nats [queries].

    Args:
        queries: unit vectors [queries, width].
        passages: unit vectors [queries, passages, width], the positive of each query first.
        excluded: bool [queries, queries·passages + queries]; True where a key (first columns, in the order of the
            passages) or a query (last columns) must not be a negative of the row's query. Excluding the key of another
            query's positive also excludes that positive from the last group. A query's own positive is never excluded,
            and the query itself always is.
    """
    count, passages_each, _ = passages.shape
    keys = passages.flatten(0, 1)
    positives = passages[:, 0]
    own = torch.eye(count, dtype=torch.bool, device=queries.device)
    no_key = torch.zeros(count, count * passages_each, dtype=torch.bool, device=queries.device)
    no_query = own
    if excluded is not None:
        keys_end = count * passages_each
        no_key, no_query = excluded[:, :keys_end].clone(), excluded[:, keys_end:] | own
    no_positive = no_key[:, ::passages_each] | own
    places = torch.arange(count, device=queries.device) * passages_each
    no_key.scatter_(1, places[:, None], False)
    similar = torch.cat([queries @ keys.T, positives @ queries.T, queries @ queries.T, positives @ positives.T], dim=1)
    no_negative = torch.cat([no_key, no_query, no_query, no_positive], dim=1)
    return F.cross_entropy((similar / temperature).masked_fill(no_negative, -torch.inf), places, reduction="none")


def no_negatives(query_rows: Tensor, query_labels: Tensor, passage_rows: Tensor, passage_labels: Tensor) -> Tensor:
    """Return the mask `excluded` of `full_contrastive_loss`: for each query its own row, the row of its positive, and
    all rows with the label of the query; bool [queries, queries·passages + queries].

    Args:
        query_rows: int64 [queries], row numbers.
        query_labels: int64 [queries], numbers of labels, unique over tasks; -1 means no label.
        passage_rows: int64 [queries, passages], row numbers, the positive of each query first.
        passage_labels: int64 [queries, passages], numbers of labels.
    """
    rows = torch.cat([passage_rows.flatten(), query_rows])
    labels = torch.cat([passage_labels.flatten(), query_labels])
    same_label = (labels == query_labels[:, None]) & (labels >= 0)
    return same_label | (rows == query_rows[:, None]) | (rows == passage_rows[:, :1])
