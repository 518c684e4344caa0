"""What the policy gradients refuse to learn from, since it would drown everything else in the step."""

import math

import torch
from torch import Tensor

from rayk.data.batches import Batch
from rayk.errors import UnusableSignal


def check_rewards(rewards: Tensor, batch: Batch, limit: float) -> None:
    """
    Args:
        rewards: nats, [counted tokens] of `batch`.
        limit: the largest that can be learned from, either way.

    Raises:
        UnusableSignal: some are larger, or no numbers; the error names their rows.
    """
    broken = ~(rewards.abs() <= limit)  # so NaN is among them
    if not bool(broken.any()):
        return
    worst = torch.tensor_split(torch.where(broken, rewards, 0.0), batch.offsets[1:-1])
    rows = [row for row, part in enumerate(worst) if bool(part.any())]
    place = getattr(batch.sequences[rows[0]], "where", "") or f"row {rows[0]} of the batch"
    found = worst[rows[0]][worst[rows[0]] != 0][0]
    raise UnusableSignal(
        f"What was written for {place} has a reward of {float(found):.4g} nats at one token, beyond "
        f"method.reward_limit ({limit:g}).", rows,
    )  # fmt: skip


def ratio_exploded(student_logprobs: Tensor, rollout_logprobs: Tensor, limit: float) -> Tensor:
    """Where a token has become more than `limit` times likelier since it was written, bool [tokens]."""
    return student_logprobs.detach() - rollout_logprobs > math.log(limit)
