"""Scale the replicas of an application by the tokens that its requesters wait for.

Serve's own measure, the number of running requests, is of little use here because requesters limit it themselves
(`rayk.serving.credit`). Instead, each request carries the number of tokens that its requester waits for in total, and
each replica reports the sum over the requesters of the last seconds.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_REMEMBER_SECONDS = 15.0
METRIC = "waiting_tokens"


@dataclass(frozen=True)
class Requester:
    """The sender of a request, and the number of tokens of all its unanswered requests."""

    name: str
    waiting_tokens: int


class Demand:
    """The waiting tokens of the requesters that one replica has seen."""

    def __init__(self) -> None:
        self._requesters: dict[str, tuple[int, float]] = {}

    @contextmanager
    def answering(self, requester: Requester | None, tokens: int) -> Iterator[None]:
        """Record the requester's waiting tokens; subtract this request's `tokens` at the end."""
        if requester is not None:
            self._requesters[requester.name] = requester.waiting_tokens, time.monotonic()
        try:
            yield
        finally:
            if requester is not None and requester.name in self._requesters:
                waiting, seen_at = self._requesters[requester.name]
                self._requesters[requester.name] = max(0, waiting - tokens), seen_at

    def waiting_tokens(self) -> int:
        """Return the sum over the requesters of the last `_REMEMBER_SECONDS`."""
        oldest = time.monotonic() - _REMEMBER_SECONDS
        self._requesters = {name: entry for name, entry in self._requesters.items() if entry[1] >= oldest}
        return sum(waiting for waiting, _ in self._requesters.values())


class WaitingTokensPolicy:
    """Serve autoscaling policy: one replica per `tokens_per_replica` waiting tokens.

    It scales up as soon as more tokens wait. It scales down by one replica when less than a quarter of that number
    waits, so that an application that keeps up with its requests is not scaled down for keeping up. It scales to zero
    when there are no requests, unless the first replica is still loading. Serve applies delays and bounds.
    """

    def __init__(self, tokens_per_replica: int):
        self.tokens_per_replica = tokens_per_replica

    def __call__(self, context: Any) -> tuple[int, dict]:
        """Return the number of replicas for Serve's AutoscalingContext, and an empty state."""
        reported = (context.aggregated_metrics or {}).get(METRIC, {})
        # Each replica sees nearly every requester, but a new replica none: the largest sum is the best estimate.
        waiting = max(reported.values(), default=0.0)
        loading = context.target_num_replicas > 0 and not context.running_replicas
        if waiting == 0 and context.total_num_requests == 0 and not loading:
            return 0, {}
        current, enough = context.target_num_replicas, math.ceil(waiting / self.tokens_per_replica)
        if enough > current:
            return enough, {}
        if waiting < 0.25 * self.tokens_per_replica * current:
            return max(1, enough, current - 1), {}
        return max(1, current), {}
