"""Bounds of memory and time for a block of code."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

MEMORY_BYTES = 1 << 30
"""Memory that the readers may take in addition to what the process has."""
SECONDS = 60
"""Time after which a reader counts as hung. Every input is small; most take microseconds."""


class TookTooLong(BaseException):
    """A block ran longer than `SECONDS`. No reader catches it."""


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Let allocations of more than `MEMORY_BYTES` fail in a block."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def bounded_time() -> Iterator[None]:
    """Raise `TookTooLong` in a block that runs longer than `SECONDS`. In the main thread only."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise TookTooLong(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
