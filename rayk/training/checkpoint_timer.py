"""Checkpoints that are due by time, or because Ray has announced that a worker's node goes away."""

import time
from typing import Any

from rayk.training.ranks import Ranks

_ASK_SECONDS = 10.0
"""Interval at which Ray Train is asked for announcements, for which all ranks wait for each other."""


class CheckpointTimer:
    """Decides on all ranks alike, by the clock of rank 0, whether a checkpoint is due after the current step.

    In each step the sum of `flags` over the ranks is given to `read`, so that no communication is added; `is_due` is
    then the same on all ranks until `restart`.

    Args:
        minutes: longest time between two checkpoints; None: no limit.
    """

    def __init__(self, minutes: float | None, ranks: Ranks):
        self._seconds, self._ranks = None if minutes is None else 60 * minutes, ranks
        self._saved_at = self._asked_at = time.monotonic()
        self._announced: Any = None
        self.is_due = False

    def flags(self) -> list[float]:
        """Return whether a checkpoint is due by time, and whether it is time to ask for announcements; zeros on other
        ranks than 0."""
        if self._ranks.rank:
            return [0.0, 0.0]
        now = time.monotonic()
        is_late = self._seconds is not None and now - self._saved_at >= self._seconds
        return [float(is_late), float(now - self._asked_at >= _ASK_SECONDS)]

    def read(self, is_late: float, asks: float) -> None:
        """Take the summed flags of a step. A collective if it is time to ask."""
        self.is_due = self.is_due or is_late > 0
        if asks:
            self._asked_at = time.monotonic()
            announced = self._ranks.preemption()
            self.is_due = self.is_due or announced != self._announced
            self._announced = announced

    def restart(self) -> None:
        """Begin to measure the time to the next checkpoint."""
        self._saved_at, self.is_due = time.monotonic(), False
