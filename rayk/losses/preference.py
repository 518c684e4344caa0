"""Preference losses on pairs of answers to one prompt: direct preference optimization (DPO, Rafailov et al. 2023, arXiv
2305.18290).

The implicit reward of an answer y to a prompt x is r(x, y) = β·(log q(y | x) − log q_ref(y | x)), with the log-probs of
student q and frozen reference q_ref summed over the answer's tokens. In the Bradley–Terry model the chosen answer wins
with probability σ(r_chosen − r_rejected); the loss is the cross-entropy of this model.
"""

from torch import Tensor
from torch.nn import functional as F

from rayk.errors import InputError
from rayk.losses.precision import upcast


def dpo_loss(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, *, beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """−(1−ε)·log σ(m) − ε·log σ(−m) for each pair, with the margin m = r_chosen − r_rejected (eq. 7 if ε = 0).

    Args:
        chosen: [pairs], log q of the chosen answers in nats, with gradient.
        rejected: [pairs], log q of the rejected answers, with gradient.
        reference_chosen: [pairs], log q_ref of the chosen answers; detached.
        reference_rejected: [pairs], log q_ref of the rejected answers; detached.
        beta: β, the strength of the pull towards the reference.
        label_smoothing: ε, the assumed share of pairs with swapped labels (conservative DPO, Mitchell 2023).

    Returns:
        Nats, [pairs]; log 2 where student and reference are equal.

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
    """Return β·(log q − log q_ref) of each answer, [answers]; `reference` is detached.

    Raises:
        InputError: β is not positive, or the shapes differ.
    """
    if not beta > 0:
        raise InputError(f"beta is {beta:g}; give a number above 0.")
    _check_shapes(logprobs, reference)
    return beta * (upcast(logprobs) - upcast(reference).detach())


def _check_shapes(first: Tensor, second: Tensor) -> None:
    # Broadcasting would compare every answer with every other answer.
    if first.ndim != 1 or first.shape != second.shape:
        raise InputError(
            f"Log-probs of answers come with one number each, [pairs]; these have shapes {list(first.shape)} and "
            f"{list(second.shape)}."
        )
