"""Preferences between two answers to one prompt: direct preference optimisation (DPO, Rafailov et al. 2023, arXiv
2305.18290).

The implicit reward of an answer y to a prompt x is r(x, y) = β·(log q(y | x) − log q_ref(y | x)): what the student has
come to give it over the frozen reference, both summed over the answer's tokens. Under Bradley and Terry's model the
chosen answer wins with probability σ(r_chosen − r_rejected), and the loss is that model's cross-entropy.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from rayk.errors import InputError


def dpo_loss(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, *, beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """−(1−ε)·log σ(m) − ε·log σ(−m) with the margin m = r_chosen − r_rejected (eq. 7 for ε = 0, of one pair).

    Args:
        chosen: [pairs], log q of the whole chosen answers in nats; gradients reach it.
        rejected: [pairs], of the rejected ones; gradients reach it too.
        reference_chosen: [pairs], the frozen reference's of the same answers; detached.
        reference_rejected: [pairs], likewise.
        beta: β, how dear it is to leave the reference; small is cheap.
        label_smoothing: ε, the share of pairs taken to be the wrong way round (conservative DPO, Mitchell 2023).

    Returns:
        Nats, [pairs]; log 2 wherever student and reference are equal.

    Raises:
        InputError: β is not positive, ε is not in [0, 0.5), or the shapes differ.
    """
    if not 0 <= label_smoothing < 0.5:
        raise InputError(f"label_smoothing is {label_smoothing:g}; give at least 0 and less than 0.5.")
    better = implicit_rewards(chosen, reference_chosen, beta)
    worse = implicit_rewards(rejected, reference_rejected, beta)
    _check_shapes(better, worse)
    margin = better - worse
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def implicit_rewards(logprobs: Tensor, reference: Tensor, beta: float) -> Tensor:
    """β·(log q − log q_ref) of whole answers, [answers]; `reference` is detached.

    Raises:
        InputError: β is not positive, or the shapes differ.
    """
    if not beta > 0:
        raise InputError(f"beta is {beta:g}; give a number above 0.")
    _check_shapes(logprobs, reference)
    return beta * (_wide(logprobs) - _wide(reference).detach())


def _check_shapes(ours: Tensor, theirs: Tensor) -> None:
    # Broadcasting would compare every answer with every other one.
    if ours.ndim != 1 or ours.shape != theirs.shape:
        raise InputError(
            f"Answers come one number each, [pairs], on every side; these are {list(ours.shape)} and "
            f"{list(theirs.shape)}."
        )


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
