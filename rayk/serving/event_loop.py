"""Run coroutines on one background event loop per process.

Requests run there, so a training step never waits for Python's network code, and the caller's own event loop (a
notebook, `asyncio.run`) is not touched.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Coroutine, Generator, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

_CLEAN_UP_SECONDS = 60.0
T = TypeVar("T")


class _Loop:
    """An event loop on a daemon thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="rayk-requests", daemon=True).start()

    def run(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        return asyncio.run_coroutine_threadsafe(work, self.loop)


_shared_loop: _Loop | None = None
_shared_loop_lock = threading.Lock()


def run_in_background(work: Coroutine[Any, Any, T]) -> "Future[T]":
    """Start `work` on this process's background loop."""
    global _shared_loop
    with _shared_loop_lock:
        if _shared_loop is None:
            _shared_loop = _Loop()
    return _shared_loop.run(work)


def wait_for(future: "Future[T]") -> T:
    """Wait for background work and return its result; an interrupted wait (Ctrl-C) cancels the work."""
    try:
        return future.result()
    finally:
        future.cancel()


def run_until_complete(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` on the background loop and return its result.

    An interrupted wait (Ctrl-C) cancels `work` and waits up to `_CLEAN_UP_SECONDS` until it has cleaned up.
    """
    ended = threading.Event()

    async def run_and_set() -> T:
        try:
            return await work
        finally:
            ended.set()

    future = run_in_background(run_and_set())
    try:
        return future.result()
    except BaseException:
        if future.cancel():
            ended.wait(_CLEAN_UP_SECONDS)
        raise


def stream_in_background(work: Iterable[Coroutine[Any, Any, T]], prefetch: int) -> Generator[T, None, None]:
    """Yield the results of `work` in order, while up to `prefetch` later coroutines run.

    Closing the generator cancels the coroutines that are still running.
    """
    running: deque[Future[T]] = deque()
    try:
        for coroutine in work:
            running.append(run_in_background(coroutine))
            if len(running) > prefetch:
                yield wait_for(running.popleft())
        while running:
            yield wait_for(running.popleft())
    finally:
        for future in running:
            future.cancel()
