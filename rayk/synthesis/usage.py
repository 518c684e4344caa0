"""What the scribes of one store have asked for and been charged, all together."""

import asyncio
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

Progress = Callable[[int, int, str], None]
"""Told (done, total, what to say of it)."""

_TELL_SECONDS = 0.2


class UsageTracker:
    """What the scribes of one store have asked for, all together, as the progress tells it.

    Args:
        charged: for what the store held before.

    Attributes:
        total: how many completions the recipe will ask for; the recipe says so.
        done: those that it has.
        asked: those that were asked for, the others being found in the store.
        unanswered: those of them that did not come, and may another time.
        refused: those that will not come.
        tokens: written in answer.
        scribes: those that ask now.
        flushing: held by the one that writes what has come.
    """

    def __init__(self, charged: Mapping[str, Any] | None = None, progress: Progress = lambda done, total, text: None):
        self.total = self.done = self.asked = self.unanswered = self.refused = self.tokens = 0
        self.scribes: list[Any] = []
        self.flushing = asyncio.Lock()
        self._charges: dict[object, Mapping[str, Any]] = {None: charged or {}}
        self._progress = progress
        self._began = self._told = time.monotonic()

    @property
    def charged(self) -> dict[str, Any]:
        """What endpoints have charged for all that the store holds, as `rayk.engines.base.Usage` names it."""
        return functools.reduce(add_usage, self._charges.values(), {})

    def charge(self, who: object, charged: Mapping[str, Any]) -> None:
        """Take down what one endpoint has charged since its scribe began."""
        self._charges[who] = charged

    def tell(self) -> None:
        """Tell the progress, unless it was told just now."""
        now = time.monotonic()
        if now - self._told < _TELL_SECONDS and self.done != self.total:
            return
        self._told = now
        seconds = max(now - self._began, 1e-3)
        text = f"{self.asked / seconds:,.1f} completions/s"
        if self.tokens:
            text += f", {self.tokens / seconds:,.0f} tokens/s"
        if (cost := self.charged.get("cost")) is not None:
            text += f", cost {cost:,.4f}"
        for number, what in ((self.unanswered, "unanswered"), (self.refused, "refused")):
            if number:
                text += f", {number:,} {what}"
        if self.asked and self.done < self.total:
            text += f", {_duration(seconds / self.asked * (self.total - self.done))} left"
        self._progress(self.done, self.total, text)


def add_usage(one: Mapping[str, Any], other: Mapping[str, Any], sign: int = 1) -> dict[str, Any]:
    """Two charges together, or with `sign` -1 what the one is above the other."""
    return {name: one.get(name, 0) + sign * other.get(name, 0) for name in {**one, **other}}


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
