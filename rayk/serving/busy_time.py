"""Time in which at least one of several overlapping requests was open."""

import time


class BusyTime:
    """A context manager that may be entered again before it is left. It counts the time in which it is entered at least
    once; enter it on one thread only."""

    def __init__(self) -> None:
        self._open = 0
        self._since = 0.0
        self._finished_seconds = 0.0

    def __enter__(self) -> None:
        if not self._open:
            self._since = time.perf_counter()
        self._open += 1

    def __exit__(self, *error: object) -> None:
        self._open -= 1
        if not self._open:
            self._finished_seconds += time.perf_counter() - self._since

    @property
    def seconds(self) -> float:
        """The time so far."""
        return self._finished_seconds + (time.perf_counter() - self._since if self._open else 0.0)
