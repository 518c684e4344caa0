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
        UnusableSignal: some are not; the error contains their rows.
    """
    broken = ~(rewards.abs() <= limit)  # so NaN is among them
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


def ratio_exploded(student_logprobs: Tensor, rollout_logprobs: Tensor, limit: float) -> Tensor:
    """Return where a token is now more than `limit` times as likely as when it was sampled, bool [tokens]."""
    return student_logprobs.detach() - rollout_logprobs > math.log(limit)
