"""DistiLLM's adaptive off-policy schedule (Ko et al. 2024, arXiv 2402.03898, §3.2; jongwooko/distillm): the share of
rollouts grows when the evaluation loss rises, and earlier rollouts are trained on again."""

import json
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np

from rayk.config import AdaptiveConfig
from rayk.data.examples import Example
from rayk.rollouts.packed_rows import pack_row, unpack_row
from rayk.rollouts.policy import Rollout


class AdaptiveSchedule:
    """φ, the share of rows with a rollout: 0 at first, increased each time the evaluation loss has risen.

    The loss is compared with the loss at the last increase, initially with that of the first evaluation (the paper's
    code evaluates once before training).
    """

    def __init__(self, settings: AdaptiveConfig, limit: float):
        """
        Args:
            limit: largest φ.
        """
        self.fraction = 0.0
        self._settings, self._limit = settings, limit
        self._reference: float | None = None

    def on_evaluation(self, loss: float) -> None:
        """Update φ after an evaluation."""
        if self._reference is None:
            self._reference = loss
        elif loss >= self._reference + self._settings.tolerance:
            self.fraction = min(self.fraction + self._settings.increment, self._limit)
            self._reference = loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"fraction": self.fraction, "reference": self._reference}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of `state_dict`."""
        self.fraction, self._reference = state["fraction"], state["reference"]


class ReplayBuffer:
    """The latest rollouts of one worker, to train on them again."""

    def __init__(self, capacity: int):
        self._rollouts: deque[Rollout] = deque(maxlen=capacity)

    @property
    def is_full(self) -> bool:
        return len(self._rollouts) == self._rollouts.maxlen

    def add(self, rollouts: Iterable[Rollout]) -> None:
        """Add `rollouts`; the oldest are dropped beyond the capacity."""
        self._rollouts.extend(rollouts)

    def at(self, position: float) -> Rollout:
        """Return the rollout at a relative position in [0, 1), from the oldest to the newest."""
        return self._rollouts[int(position * len(self._rollouts))]

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the state for a checkpoint."""
        return [
            pack_row(rollout) | {"where": rollout.where, "fields": json.dumps(dict(rollout.fields), default=str)}
            for rollout in list(self._rollouts)
        ]

    def load_state_dict(self, rows: list[dict[str, Any]]) -> None:
        """Restore the state of `state_dict`."""
        self._rollouts.clear()
        for row in rows:
            packed = {name: value for name, value in row.items() if name not in ("where", "fields")}
            empty = np.zeros(0, np.int32)
            origin = Example(empty, empty.astype(bool), where=row["where"], fields=json.loads(row["fields"]))
            rollout = unpack_row(packed, origin)
            assert isinstance(rollout, Rollout)
            self._rollouts.append(rollout)
