"""The share of rollouts follows the evaluation loss; a buffer keeps earlier rollouts."""

import io

import numpy as np
import pytest
import torch

from rayk.config import AdaptiveConfig
from rayk.rollouts import Rollout
from rayk.rollouts.adaptive import AdaptiveSchedule, ReplayBuffer


def test_share_grows_when_the_loss_has_risen():
    schedule = AdaptiveSchedule(AdaptiveConfig(tolerance=0.1, increment=0.3), limit=0.7)
    losses = [2.0, 2.05, 1.5, 2.05, 2.2, 2.25, 2.4, 9.0, 99.0]
    shares = []
    for loss in losses:
        schedule.on_evaluation(loss)
        shares.append(schedule.fraction)
    assert shares == pytest.approx([0, 0, 0, 0, 0.3, 0.3, 0.6, 0.7, 0.7])
    again = AdaptiveSchedule(AdaptiveConfig(tolerance=0.1), limit=0.7)
    again.load_state_dict(schedule.state_dict())
    again.on_evaluation(99.05)
    assert again.fraction == 0.7


def rollout(number):
    ids = np.array([number, 5, 6], np.int32)
    return Rollout(
        ids, np.arange(3) > 0, None, 1, f"line {number}", {"n": number}, logprobs=np.float32([-1, -2]), version=number
    )


def test_buffer_keeps_the_newest_and_survives_a_checkpoint():
    buffer = ReplayBuffer(3)
    buffer.add([rollout(1), rollout(2)])
    assert not buffer.is_full
    buffer.add([rollout(3), rollout(4)])
    assert buffer.is_full
    file = io.BytesIO()
    torch.save(buffer.state_dict(), file)
    file.seek(0)
    again = ReplayBuffer(3)
    again.load_state_dict(torch.load(file, weights_only=True))
    for kept in (buffer, again):
        found = [kept.at(place) for place in (0.0, 0.34, 0.999)]
        assert [(each.version, each.where, dict(each.fields)) for each in found] == [
            (n, f"line {n}", {"n": n}) for n in (2, 3, 4)
        ]
        assert [each.logprobs.tolist() for each in found] == [[-1, -2]] * 3
