"""DistiLLM's adaptive use of what the student writes (Ko et al. 2024, arXiv 2402.03898, §3.2; jongwooko/distillm): only
as much of it as the evaluation loss asks for, and old rollouts again instead of ever new ones."""

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
    """φ, the share of rows that the student writes: 0 at first, more each time the evaluation loss has risen.

    The loss is held against that of the last rise, at first against that of the first evaluation (the paper's code
    measures once before training).
    """

    def __init__(self, settings: AdaptiveConfig, most: float):
        """`most`: what φ never exceeds."""
        self.fraction = 0.0
        self._settings, self._most = settings, most
        self._reference: float | None = None

    def on_evaluation(self, loss: float) -> None:
        """Take note of an evaluation's loss."""
        if self._reference is None:
            self._reference = loss
        elif loss >= self._reference + self._settings.tolerance:
            self.fraction = min(self.fraction + self._settings.increment, self._most)
            self._reference = loss

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"fraction": self.fraction, "reference": self._reference}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.fraction, self._reference = state["fraction"], state["reference"]


class ReplayBuffer:
    """The last rollouts of one worker, to learn from again."""

    def __init__(self, capacity: int):
        self._rollouts: deque[Rollout] = deque(maxlen=capacity)

    @property
    def full(self) -> bool:
        return len(self._rollouts) == self._rollouts.maxlen

    def add(self, rollouts: Iterable[Rollout]) -> None:
        """Keep `rollouts`; the oldest make room."""
        self._rollouts.extend(rollouts)

    def at(self, place: float) -> Rollout:
        """The rollout at `place`, a share of the way from the oldest to the newest, in [0, 1)."""
        return self._rollouts[int(place * len(self._rollouts))]

    def state_dict(self) -> list[dict[str, Any]]:
        """For a checkpoint."""
        return [
            pack_row(rollout) | {"where": rollout.where, "fields": json.dumps(dict(rollout.fields), default=str)}
            for rollout in list(self._rollouts)
        ]

    def load_state_dict(self, rows: list[dict[str, Any]]) -> None:
        """Take up what `state_dict` gave."""
        self._rollouts.clear()
        for row in rows:
            packed = {name: value for name, value in row.items() if name not in ("where", "fields")}
            nothing = np.zeros(0, np.int32)
            origin = Example(nothing, nothing.astype(bool), where=row["where"], fields=json.loads(row["fields"]))
            rollout = unpack_row(packed, origin)
            assert isinstance(rollout, Rollout)
            self._rollouts.append(rollout)
