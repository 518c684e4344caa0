"""Client-side rate limits for endpoints."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable


class RateLimit:
    """A number of units per minute, spread evenly, first come, first served. None: no limit."""

    def __init__(
        self, per_minute: float | None, clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ):  # fmt: skip
        self._seconds_per_unit = 60 / per_minute if per_minute else 0.0
        self._clock, self._sleep = clock, sleep
        self._free_at = -math.inf

    async def acquire(self, units: float) -> None:
        """Wait until the time of all units acquired before has passed."""
        now = self._clock()
        start = max(now, self._free_at)
        self._free_at = start + units * self._seconds_per_unit
        await self._sleep(start - now)

    def release(self, units: float) -> None:
        """Return acquired units that were not used; a negative number adds units used beyond those acquired."""
        self._free_at -= units * self._seconds_per_unit
