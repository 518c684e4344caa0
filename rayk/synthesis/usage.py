"""Count the requests and charges of all clients that share one store, and report progress."""

import asyncio
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from rayk.errors import RaykError
from rayk.teachers import Teacher

Progress = Callable[[int, int, str], None]
"""Called with (number done, total number, text)."""

_REPORT_SECONDS = 0.2
_USAGE_SECONDS = 5.0


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
        meters: meters of the clients in use.
        flush_lock: held while completions are written to disk.
    """

    def __init__(
        self, earlier_charges: Mapping[str, Any] | None = None, progress: Progress = lambda done, total, text: None
    ):
        self.total = self.done = self.requested = self.unanswered = self.refused = self.tokens = 0
        self.meters: list[EndpointMeter] = []
        self.flush_lock = asyncio.Lock()
        self._charges: dict[object, Mapping[str, Any]] = {None: earlier_charges or {}}
        self._progress = progress
        self._start = self._last_report = time.monotonic()

    @property
    def charges(self) -> dict[str, Any]:
        """Charges of all endpoints for all completions of the store, by the names of `rayk.engines.base.Usage`."""
        return functools.reduce(add_usage, self._charges.values(), {})

    @property
    def has_unbilled(self) -> bool:
        """Whether completions have arrived whose charges are not known yet."""
        return any(meter.has_unbilled for meter in self.meters)

    async def update_charges(self) -> None:
        """Query the charges of all endpoints that have generated completions since the last query."""
        for meter in list(self.meters):
            await meter.update()
            self._charges[meter] = meter.charges

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


class EndpointMeter:
    """Counts what an endpoint charges one client, from the total that its replica counts.

    Attributes:
        has_unbilled: whether completions have arrived since the charges were last updated; set by the client.
        charges: charges since `start`, by the names of `rayk.engines.base.Usage`; empty for other engines.
    """

    def __init__(self, teacher: Teacher):
        self.has_unbilled = False
        self.charges: dict[str, Any] = {}
        self._teacher = teacher
        self._charges_of_lost_replicas: dict[str, Any] = {}
        self._at_start: dict[str, Any] = {}
        self._last: dict[str, Any] = {}

    async def start(self) -> None:
        """Begin to count."""
        self._at_start = self._last = await self._query()

    async def update(self) -> None:
        """Query the endpoint's charges if completions have arrived since the last query.

        A replica that does not respond within 5 seconds is queried again next time.
        """
        if not self.has_unbilled:
            return
        self.has_unbilled = False
        try:
            async with asyncio.timeout(_USAGE_SECONDS):
                usage = await self._query()
        except (TimeoutError, RaykError):
            self.has_unbilled = True
            return
        if usage:
            if usage["requests"] < self._last.get("requests", 0):  # a new replica counts from 0
                self._charges_of_lost_replicas, self._at_start = self.charges, {}
            self._last = usage
            self.charges = add_usage(self._charges_of_lost_replicas, add_usage(usage, self._at_start, -1))

    async def _query(self) -> dict[str, Any]:
        """Return what the endpoint has charged all clients since its replica started; empty for other engines."""
        if self._teacher.info.engine != "openai":
            return {}
        usage = await self._teacher.ausage()
        return {} if usage is None else {name: value for name, value in asdict(usage).items() if value is not None}


def add_usage(one: Mapping[str, Any], other: Mapping[str, Any], sign: int = 1) -> dict[str, Any]:
    """Add two charges name by name, or with `sign` -1 subtract the second."""
    return {name: one.get(name, 0) + sign * other.get(name, 0) for name in {**one, **other}}


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
