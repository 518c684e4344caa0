"""Limit the number of calls that one requester has open: a fixed number per running replica."""

import asyncio
import time
from collections import deque

import ray
from ray.serve.exceptions import RayServeException

from rayk.serving import application as applications

_COUNT_SECONDS = 3.0  # shortest time between two counts of the replicas


class Credit:
    """Semaphore with `calls_per_replica` slots per running replica, as an async context manager.

    Waiters acquire slots in first-in, first-out order. Use it on the background event loop only.
    """

    def __init__(self, application: str, calls_per_replica: int):
        self._application, self._calls_per_replica = application, calls_per_replica
        self._replicas, self._counted_at = 1, -_COUNT_SECONDS
        self._open = 0
        self._queue: deque[asyncio.Future[None]] = deque()
        self._counting: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        if self._open >= self._replicas * self._calls_per_replica or self._queue:
            place = asyncio.get_running_loop().create_future()
            self._queue.append(place)
            self._refresh_count()
            try:
                await place
            except asyncio.CancelledError:
                if place.done() and not place.cancelled():  # the slot was granted at the same moment
                    self._release()
                raise
        else:
            self._open += 1

    async def __aexit__(self, *_: object) -> None:
        self._release()
        if self._queue:
            self._refresh_count()

    async def replicas(self) -> int:
        """Return the number of running replicas (at least 1), at most `_COUNT_SECONDS` old."""
        self._refresh_count()
        if self._counting is not None:
            await asyncio.shield(self._counting)
        return self._replicas

    def _release(self) -> None:
        self._open -= 1
        self._admit()

    def _admit(self) -> None:
        while self._queue and self._open < self._replicas * self._calls_per_replica:
            place = self._queue.popleft()
            if not place.done():
                self._open += 1
                place.set_result(None)

    def _refresh_count(self) -> None:
        """Start counting the replicas again if the last count is older than `_COUNT_SECONDS`."""
        if self._counting is None and time.monotonic() - self._counted_at > _COUNT_SECONDS:
            self._counting = asyncio.create_task(self._count())

    async def _count(self) -> None:
        """Count the replicas, in a thread so that the loop is not blocked, and admit waiters to new slots."""
        try:
            self._replicas = max(1, await asyncio.to_thread(applications.count_replicas, self._application))
        except (ray.exceptions.RayError, RayServeException):
            pass  # Serve's controller is restarting: keep the last count
        finally:
            self._counted_at, self._counting = time.monotonic(), None
            self._admit()
