"""One event loop a process, on a thread of its own: what asks teachers runs there, so that a training step never waits
for Python's network code and a notebook's own loop is left alone."""

import asyncio
import threading
from collections import deque
from collections.abc import Coroutine, Generator, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

_PUT_AWAY_SECONDS = 60.0
T = TypeVar("T")


class _Loop:
    """One event loop on a daemon thread, shared by all teachers of this process."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="rayk-teachers", daemon=True).start()

    def run(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        return asyncio.run_coroutine_threadsafe(work, self.loop)


_shared_loop: _Loop | None = None
_shared_loop_lock = threading.Lock()


def run_in_background(work: Coroutine[Any, Any, T]) -> "Future[T]":
    """Run `work` on this process's background loop."""
    global _shared_loop
    with _shared_loop_lock:
        if _shared_loop is None:
            _shared_loop = _Loop()
    return _shared_loop.run(work)


def wait_for(future: "Future[T]") -> T:
    """The result of background work; whatever interrupts the wait (Ctrl-C) cancels the work."""
    try:
        return future.result()
    finally:
        future.cancel()


def run_until_complete(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, run on the background loop. Whatever interrupts the wait (Ctrl-C) cancels it, and then lets
    it put away what it has."""
    ended = threading.Event()

    async def noted() -> T:
        try:
            return await work
        finally:
            ended.set()

    future = run_in_background(noted())
    try:
        return future.result()
    except BaseException:
        if future.cancel():
            ended.wait(_PUT_AWAY_SECONDS)
        raise


def stream_in_background(work: Iterable[Coroutine[Any, Any, T]], prefetch: int) -> Generator[T, None, None]:
    """Results of `work` in order, up to `prefetch` pieces begun ahead; leaving early cancels what is under way."""
    under_way: deque[Future[T]] = deque()
    try:
        for piece in work:
            under_way.append(run_in_background(piece))
            if len(under_way) > prefetch:
                yield wait_for(under_way.popleft())
        while under_way:
            yield wait_for(under_way.popleft())
    finally:
        for future in under_way:
            future.cancel()
