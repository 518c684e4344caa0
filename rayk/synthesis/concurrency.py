"""Run coroutines concurrently and yield their results in order."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


async def run_in_order(work: Iterable[Coroutine[Any, Any, T]], limit: int) -> AsyncGenerator[T, None]:
    """Run coroutines, at most `limit` at a time, and yield their results in order. Closing early cancels the others."""
    running: list[asyncio.Task[T]] = []
    try:
        for coroutine in work:
            running.append(asyncio.create_task(coroutine))
            if len(running) >= limit:
                yield await running.pop(0)
        while running:
            yield await running.pop(0)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
