"""How long a client waits for an application: while it answers, or loads a replica, a request may take any time."""

import time
from collections import defaultdict, deque

POLL_SECONDS = 1.0
"""Interval at which a client looks whether a replica is loading, once it would give up otherwise."""
_LEAST_SECONDS = 10.0
_REMEMBERED_ANSWERS = 32


class Patience:
    """The clock of one client's requests.

    A request has failed when the application has answered none of the client's requests for `seconds`. Time in which no
    replica runs but one is loading does not count, up to twice the time that a replica took to load before.
    """

    def __init__(self, seconds: float, load_seconds: float = 0.0):
        """
        Args:
            seconds: longest time without progress.
            load_seconds: time that a replica takes to load the model.
        """
        self.seconds = seconds
        self._loading_allowed = 2 * load_seconds
        self._loading = self._loading_noted_at = 0.0
        self._progress_at = 0.0
        self._durations: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED_ANSWERS))

    def note_answer(self, method: str, seconds: float) -> None:
        """Record that the application has answered a request after `seconds`."""
        self._progress_at, self._loading = time.monotonic(), 0.0
        self._durations[method].append(seconds)

    def note_loading(self) -> bool:
        """Record that now a replica loads while no other runs; called each `POLL_SECONDS` by every waiting request.
        Return whether that time may be left out of account."""
        now = time.monotonic()
        self._loading += min(now - self._loading_noted_at, POLL_SECONDS)
        self._loading_noted_at = now
        return self._loading <= self._loading_allowed

    def remaining(self, began: float) -> float:
        """Return the seconds that a request that began at `began` (`time.monotonic`) may still take without
        progress."""
        return max(began, self._progress_at) + self.seconds + self._loading - time.monotonic()

    def ask_again_seconds(self, method: str) -> float:
        """Return the seconds after which a request is sent to another replica, too: three times the slowest of the last
        answers, but soon enough that the other replica can answer in time."""
        slowest = max(self._durations[method], default=self.seconds)
        return min(max(_LEAST_SECONDS, 3 * slowest), self.seconds / 3)
