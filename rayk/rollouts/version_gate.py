"""When the policy may write for a step: in the order of the steps, and under exactly the weights each was promised."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class VersionGate:
    """Step i samples under version max(first, i − max_staleness), the version being the number of optimiser steps done.

    Steps take turns one by one, in order, so what shares a batch never depends on who is quicker. The policy moves on
    to the next version only after the last step that was promised the present one has had its turn.
    """

    def __init__(self, version: int, next_step: int, last_step: int, max_staleness: int):
        """
        Args:
            version: what the policy holds now.
            next_step: the first step that is to have a turn.
            last_step: the last one of the run.
        """
        self.version = version
        self._next, self._last, self._max_staleness = next_step, last_step, max_staleness
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def turn(self, step: int) -> AsyncIterator[None]:
        """Held while the policy is used for `step`; waits until it may be."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._next == step and self.version >= step - self._max_staleness)
        try:
            yield
        finally:
            async with self._changed:
                self._next += 1
                self._changed.notify_all()

    async def finished(self) -> None:
        """Wait until every step that was promised the present version has had its turn."""
        last = min(self.version + self._max_staleness, self._last)
        async with self._changed:
            await self._changed.wait_for(lambda: self._next > last)

    async def advance(self) -> None:
        """Begin the turns of the next version, whose weights the policy has taken over."""
        async with self._changed:
            self.version += 1
            self._changed.notify_all()
