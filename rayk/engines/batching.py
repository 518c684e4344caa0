"""Merge concurrent requests into batches of similar length, and run coroutines concurrently."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class _Job:
    key: Hashable
    item: Any
    length: int
    done: asyncio.Future = field(repr=False)


class MicroBatcher:
    """Computes items in batches on its own thread, so that the event loop is not blocked.

    Each batch starts with the oldest waiting item and is filled with the items nearest to it in length, so short
    sequences are not padded to long ones and no item waits forever. Items wait only while a batch is running.
    """

    def __init__(self, run: Callable[[Hashable, list[Any]], list[Any]], budget_tokens: int):
        """
        Args:
            run: called as `run(key, items)`; returns one result per item. Only items of equal `key` share a batch.
            budget_tokens: largest number of padded tokens in a batch of several items.
        """
        self._run = run
        self._budget = budget_tokens
        self._waiting: list[_Job] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._worker: asyncio.Task | None = None
        self._progress_at: float | None = None

    def note_progress(self) -> None:
        """Record that the running batch has advanced; callable from any thread."""
        if self._progress_at is not None:
            self._progress_at = time.monotonic()

    @property
    def stalled_seconds(self) -> float:
        """Seconds since the running batch has advanced; 0 if none is running."""
        since = self._progress_at
        return 0.0 if since is None else time.monotonic() - since

    async def submit(self, key: Hashable, items: Sequence[Any], lengths: Sequence[int]) -> list[Any]:
        """Return the items' results, in order; raise the first error of any of their batches."""
        loop = asyncio.get_running_loop()
        jobs = [_Job(key, item, length, loop.create_future()) for item, length in zip(items, lengths, strict=True)]
        self._waiting.extend(jobs)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        try:
            return await asyncio.gather(*(job.done for job in jobs))
        finally:
            # Remove the items of a caller that was cancelled or that got an error from another of its batches.
            cancelled = {id(job) for job in jobs if job.done.cancelled() or not job.done.done()}
            self._waiting = [job for job in self._waiting if id(job) not in cancelled]

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            jobs = self._next_batch()
            self._progress_at = time.monotonic()
            try:
                results = await loop.run_in_executor(self._thread, self._run, jobs[0].key, [job.item for job in jobs])
            except Exception as error:
                for job in jobs:
                    if not job.done.done():
                        job.done.set_exception(error)
                        job.done.exception()  # marks it as retrieved, because a cancelled caller does not retrieve it
            else:
                for job, result in zip(jobs, results, strict=True):
                    if not job.done.done():
                        job.done.set_result(result)
            finally:
                self._progress_at = None

    def _next_batch(self) -> list[_Job]:
        oldest = self._waiting[0]
        candidates = sorted(
            (job for job in self._waiting if job.key == oldest.key), key=lambda job: abs(job.length - oldest.length)
        )
        batch: list[_Job] = []
        longest = 0
        for job in candidates:
            longest = max(longest, job.length)
            if batch and longest * (len(batch) + 1) > self._budget:
                break
            batch.append(job)
        taken = {id(job) for job in batch}
        self._waiting = [job for job in self._waiting if id(job) not in taken]
        return batch


@asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """Like `asyncio.TaskGroup`, but re-raises the first error itself, not an ExceptionGroup."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as failures:
        first = failures.exceptions[0]
        raise first from first.__cause__


async def gather(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Return all results in order; the first error cancels the remaining coroutines and is raised."""
    async with task_group() as group:
        tasks = [group.create_task(coroutine) for coroutine in coroutines]
    return [task.result() for task in tasks]
