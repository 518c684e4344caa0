"""Distances between hidden states of a student's and a teacher's layer, and between the relations of their tokens
(feature distillation)."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rayk.losses.precision import upcast


def squared_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return (1/d)·‖h_S − h_T‖² of each token's states (FitNets, arXiv 1412.6550; TED, 2210.01351), [tokens].

    Args:
        student, teacher: [tokens, d]; the teacher's are detached.
    """
    return (upcast(student) - upcast(teacher).detach()).square().mean(dim=1)


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 − cos(h_S, h_T) of each token's states (DistilBERT, arXiv 1910.01108), [tokens]; arguments as in
    `squared_distance`."""
    return 1 - F.cosine_similarity(upcast(student), upcast(teacher).detach(), dim=1)


FEATURE_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": squared_distance, "cosine": cosine_distance}
"""The distances of method `layerwise` by their names in the settings."""


def relation_divergence(student: Tensor, teacher: Tensor, offsets: Tensor, heads: int) -> Tensor:
    """Return how the relations of each token to itself and those before it differ (MiniLMv2, arXiv 2012.15828, §3.1),
    [tokens]:

        (1/heads) Σ_a KL( softmax_j(A_t·A_j / √d) ‖ softmax_j(B_t·B_j / √d) ),   j ≤ t in the same row

    A are the teacher's vectors (queries, keys or values) and B the student's, each split into `heads` parts of size d.
    The scores of one row are in memory at a time, and are computed again for the gradient.

    Args:
        student, teacher: [tokens, width], where the widths may differ; the teacher's are detached.
        offsets: [rows + 1], the rows' first tokens.
        heads: the number of relation heads, which divides both widths.
    """
    student, teacher = upcast(student), upcast(teacher).detach()
    bounds = offsets.tolist()
    rows = [
        checkpoint(_row_divergence, student[start:end], teacher[start:end], heads, use_reentrant=False)
        for start, end in pairwise(bounds)
    ]
    return torch.cat(rows) if rows else student.sum(dim=1)


def _row_divergence(student: Tensor, teacher: Tensor, heads: int) -> Tensor:
    log_q, log_p = _relations(student, heads), _relations(teacher, heads)
    later = log_p == -math.inf
    terms = log_p.exp() * (log_p - log_q).masked_fill(later, 0.0)
    return terms.sum(dim=2).mean(dim=0)


def _relations(vectors: Tensor, heads: int) -> Tensor:
    """Return the log of the relations of the tokens of a row, [heads, tokens, tokens]."""
    parts = vectors.unflatten(1, (heads, -1)).transpose(0, 1)
    scores = parts @ parts.transpose(1, 2) / math.sqrt(parts.shape[2])
    later = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(later, -math.inf).log_softmax(dim=2)
