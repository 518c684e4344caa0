"""Count the requests and charges of all clients that share one store, and report progress."""

import asyncio
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

Progress = Callable[[int, int, str], None]
"""Called with (number done, total number, text)."""

_REPORT_SECONDS = 0.2


class MeteredClient(Protocol):
    """A client whose endpoint may charge for completions."""

    @property
    def has_unbilled(self) -> bool:
        """Whether completions have arrived since the charges were last updated."""
        ...

    async def update_charges(self) -> None:
        """Pass the endpoint's current charges to `UsageTracker.set_charges`."""


class UsageTracker:
    """Requests and charges of all clients of one store.

    Args:
        earlier_charges: charges for the completions that the store already contains.

    Attributes:
        total: number of completions that the recipe will need; set by the recipe.
        done: number of completions available so far.
        requested: number of completions requested from a model; the others were in the store.
        unanswered: number of requests that failed and may succeed in another run.
        refused: number of requests that were refused for good.
        tokens: number of generated tokens.
        clients: clients in use.
        flush_lock: held while completions are written to disk.
    """

    def __init__(
        self, earlier_charges: Mapping[str, Any] | None = None, progress: Progress = lambda done, total, text: None
    ):
        self.total = self.done = self.requested = self.unanswered = self.refused = self.tokens = 0
        self.clients: list[MeteredClient] = []
        self.flush_lock = asyncio.Lock()
        self._charges: dict[object, Mapping[str, Any]] = {None: earlier_charges or {}}
        self._progress = progress
        self._start = self._last_report = time.monotonic()

    @property
    def charges(self) -> dict[str, Any]:
        """Charges of all endpoints for all completions of the store, by the names of `rayk.engines.base.Usage`."""
        return functools.reduce(add_usage, self._charges.values(), {})

    def set_charges(self, client: object, charges: Mapping[str, Any]) -> None:
        """Set the charges of one client's endpoint since the client was opened."""
        self._charges[client] = charges

    def report(self) -> None:
        """Report progress, but no more often than every 0.2 seconds, except at the end."""
        now = time.monotonic()
        if now - self._last_report < _REPORT_SECONDS and self.done != self.total:
            return
        self._last_report = now
        seconds = max(now - self._start, 1e-3)
        text = f"{self.requested / seconds:,.1f} completions/s"
        if self.tokens:
            text += f", {self.tokens / seconds:,.0f} tokens/s"
        if (cost := self.charges.get("cost")) is not None:
            text += f", cost {cost:,.4f}"
        for count, name in ((self.unanswered, "unanswered"), (self.refused, "refused")):
            if count:
                text += f", {count:,} {name}"
        if self.requested and self.done < self.total:
            text += f", {_duration(seconds / self.requested * (self.total - self.done))} left"
        self._progress(self.done, self.total, text)


def add_usage(one: Mapping[str, Any], other: Mapping[str, Any], sign: int = 1) -> dict[str, Any]:
    """Add two charges name by name, or with `sign` -1 subtract the second."""
    return {name: one.get(name, 0) + sign * other.get(name, 0) for name in {**one, **other}}


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
