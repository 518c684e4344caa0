"""Limits on rewards and probability ratios, beyond which a policy gradient would dominate the whole step."""

import math

import torch
from torch import Tensor

from rayk.data.batches import Batch
from rayk.errors import UnusableSignal


def check_rewards(rewards: Tensor, batch: Batch, limit: float) -> None:
    """Check that all rewards are numbers of at most `limit` in absolute value.

    Args:
        rewards: nats, [counted tokens] of `batch`.

    Raises:
        UnusableSignal: a reward is NaN or beyond the limit; the error lists the rows.
    """
    broken = ~(rewards.abs() <= limit)  # also True for NaN
    if not bool(broken.any()):
        return
    worst = torch.tensor_split(torch.where(broken, rewards, 0.0), batch.offsets[1:-1])
    rows = [row for row, part in enumerate(worst) if bool(part.any())]
    place = getattr(batch.sequences[rows[0]], "where", "") or f"row {rows[0]} of the batch"
    found = worst[rows[0]][worst[rows[0]] != 0][0]
    raise UnusableSignal(
        f"The completion of {place} has a reward of {float(found):.4g} nats at one token, beyond "
        f"method.reward_limit ({limit:g}).", rows,
    )  # fmt: skip


def exceeds_ratio_limit(student_logprobs: Tensor, rollout_logprobs: Tensor, limit: float) -> Tensor:
    """Return True for tokens that are now more than `limit` times as likely as at sampling time, bool [tokens]."""
    return student_logprobs.detach() - rollout_logprobs > math.log(limit)
