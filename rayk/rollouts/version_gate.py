"""Schedule the use of the policy: steps sample in order, each with exactly the weight version that it requires."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class VersionGate:
    """Gate through which step i samples with version max(first, i − max_staleness).

    The version is the number of optimizer steps. Steps take turns in order, so the composition of a batch never depends
    on timing. The version advances only after the last step that requires the current one has had its turn.
    """

    def __init__(self, version: int, next_step: int, last_step: int, max_staleness: int):
        """
        Args:
            version: the policy's current weight version.
            next_step: the first step that takes a turn.
            last_step: the last step of the run.
        """
        self.version = version
        self._next, self._last, self._max_staleness = next_step, last_step, max_staleness
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def turn(self, step: int) -> AsyncIterator[None]:
        """Wait for the turn of `step`, and end it after the block, which may use the policy."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._next == step and self.version >= step - self._max_staleness)
        try:
            yield
        finally:
            async with self._changed:
                self._next += 1
                self._changed.notify_all()

    async def wait_for_samplers(self) -> None:
        """Wait until all steps that require the current version have had their turn."""
        last = min(self.version + self._max_staleness, self._last)
        async with self._changed:
            await self._changed.wait_for(lambda: self._next > last)

    async def advance(self) -> None:
        """Allow the turns that require the next version; call it after the policy has loaded these weights."""
        async with self._changed:
            self.version += 1
            self._changed.notify_all()
