"""How fast an endpoint may be asked."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable


class RateLimit:
    """So many units a minute, evenly spread; takers go in the order they came. None: no limit."""

    def __init__(
        self, per_minute: float | None, clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ):  # fmt: skip
        self._seconds_each = 60 / per_minute if per_minute else 0.0
        self._clock, self._sleep = clock, sleep
        self._free_at = -math.inf

    async def take(self, units: float) -> None:
        """Wait until what was taken before is worked off."""
        now = self._clock()
        start = max(now, self._free_at)
        self._free_at = start + units * self._seconds_each
        await self._sleep(start - now)

    def give_back(self, units: float) -> None:
        """So many of the units taken were not used; negative: more were."""
        self._free_at -= units * self._seconds_each
