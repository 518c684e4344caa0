"""Distances between hidden states of a student's and a teacher's layer (feature distillation)."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

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
