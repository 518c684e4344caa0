"""Client-side rate limits for endpoints."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable


class RateLimit:
    """Limits the units (requests or tokens) per minute; they are spread evenly, in first-in, first-out order.

    Args:
        per_minute: None for no limit.
    """

    def __init__(
        self, per_minute: float | None, clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ):  # fmt: skip
        self._seconds_per_unit = 60 / per_minute if per_minute else 0.0
        self._clock, self._sleep = clock, sleep
        self._free_at = -math.inf

    async def acquire(self, units: float) -> None:
        """Acquire `units`: wait until the limit allows all units that were acquired earlier."""
        now = self._clock()
        start = max(now, self._free_at)
        self._free_at = start + units * self._seconds_per_unit
        await self._sleep(start - now)

    def release(self, units: float) -> None:
        """Give back acquired units that were not used; a negative number takes units that were used in addition."""
        self._free_at -= units * self._seconds_per_unit
