"""Ctrl-C and SIGTERM during training: the first one stops the run after a finished step, with a checkpoint.

The driver writes a file into the run directory, which workers look for between steps: rank 0 shares that directory with
the driver in any case, and one rank that sees the file stops all of them.
"""

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class StopRequest:
    """A request to stop a run after its current step, visible to all processes that see the run directory."""

    def __init__(self, folder: Path):
        self._file = folder / "stop-requested"

    def make(self) -> None:
        with contextlib.suppress(OSError):
            self._file.touch()

    def withdraw(self) -> None:
        with contextlib.suppress(OSError):
            self._file.unlink(missing_ok=True)

    def exists(self) -> bool:
        return self._file.exists()


@contextlib.contextmanager
def stop_gracefully(request: StopRequest, abort: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into `request`; the second one calls `abort` and is handled as before.

    After an interrupted block KeyboardInterrupt is raised, even if the block ended normally. Outside the main thread,
    which alone receives signals, the block runs as it is.

    Raises:
        KeyboardInterrupt: SIGINT or SIGTERM arrived.
    """
    request.withdraw()  # that of a driver that was killed
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # A process that ignores a signal, or dies of SIGTERM, keeps doing so.
    handled = {number: handler for number, handler in previous.items() if callable(handler)}
    interrupted = False

    def handle(number: int, frame: Any) -> None:
        nonlocal interrupted
        if interrupted:
            abort()
            handled[signal.Signals(number)](number, frame)
            raise KeyboardInterrupt  # the previous handler did not
        interrupted = True
        request.make()
        logger.warning("Stopping after the current step with a checkpoint; interrupt again to stop at once.")

    for number in handled:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in handled.items():
            signal.signal(number, handler)
        request.withdraw()
    if interrupted:
        raise KeyboardInterrupt
