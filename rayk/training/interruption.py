"""Ctrl-C and SIGTERM during training: the first one stops the run after a finished step, with a checkpoint.

The driver writes a file into the run directory, and workers look for it between steps. Rank 0 always shares the
directory with the driver, and one rank that sees the file stops all ranks.
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
    """A request to stop a run after its current step: a file, visible to all processes that share the run directory."""

    def __init__(self, folder: Path):
        self._file = folder / "stop-requested"

    def make(self) -> None:
        """Create the file, if the run directory can be written."""
        with contextlib.suppress(OSError):
            self._file.touch()

    def withdraw(self) -> None:
        """Delete the file, if it exists."""
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
    request.withdraw()  # the request of an earlier driver that was killed
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # Signals that are ignored or have the system's default action are left as they are.
    handled = {number: handler for number, handler in previous.items() if callable(handler)}
    interrupted = False

    def handle(number: int, frame: Any) -> None:
        nonlocal interrupted
        if interrupted:
            abort()
            handled[signal.Signals(number)](number, frame)
            raise KeyboardInterrupt  # if the previous handler did not raise
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
