"""How much one asker may have open: so many calls for each replica that runs."""

import asyncio
import time
from collections import deque

import ray
from ray.serve.exceptions import RayServeException

from rayk.serving import application as applications

_LOOK_SECONDS = 3.0


class Credit:
    """How many calls may be open: so many for each replica that runs. Used on the background loop only."""

    def __init__(self, application: str, for_each: int):
        self._application, self._for_each = application, for_each
        self._replicas, self._looked = 1, -_LOOK_SECONDS
        self._open = 0
        self._queue: deque[asyncio.Future[None]] = deque()
        self._look: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        if self._open >= self._replicas * self._for_each or self._queue:
            place = asyncio.get_running_loop().create_future()
            self._queue.append(place)
            self._look_again()
            try:
                await place
            except asyncio.CancelledError:
                if place.done() and not place.cancelled():  # it was let in just then
                    self._leave()
                raise
        else:
            self._open += 1

    async def __aexit__(self, *_: object) -> None:
        self._leave()
        self._look_again()

    async def replicas(self) -> int:
        """How many replicas run, looked up now and then; at least 1."""
        if self._look is None and time.monotonic() - self._looked > _LOOK_SECONDS:
            self._look = asyncio.create_task(self._count())
        if self._look is not None:
            await asyncio.shield(self._look)
        return self._replicas

    def _leave(self) -> None:
        self._open -= 1
        self._let_in()

    def _let_in(self) -> None:
        while self._queue and self._open < self._replicas * self._for_each:
            place = self._queue.popleft()
            if not place.done():
                self._open += 1
                place.set_result(None)

    def _look_again(self) -> None:
        """While somebody waits, count the replicas now and then, off this loop."""
        if self._queue and self._look is None and time.monotonic() - self._looked > _LOOK_SECONDS:
            self._look = asyncio.create_task(self._count())

    async def _count(self) -> None:
        try:
            self._replicas = max(1, await asyncio.to_thread(applications.count_replicas, self._application))
        except (ray.exceptions.RayError, RayServeException):
            pass  # the controller restarts: as many as before
        finally:
            self._looked, self._look = time.monotonic(), None
            self._let_in()
