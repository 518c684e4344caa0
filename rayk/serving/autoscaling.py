"""Scale the replicas of an application by the number of tokens that its requesters wait for.

Serve's own measure, the number of running requests, is of little use here because requesters limit it themselves
(`rayk.serving.credit`). Instead, each request carries the number of tokens of all unanswered requests of its requester,
and each replica reports the sum over the requesters that it has received a request from in the last seconds.
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
    """The waiting tokens of the requesters that have sent requests to one replica."""

    def __init__(self) -> None:
        self._requesters: dict[str, tuple[int, float]] = {}

    @contextmanager
    def track_request(self, requester: Requester | None, tokens: int) -> Iterator[None]:
        """Record the requester's waiting tokens; at the end of the block subtract this request's `tokens`."""
        if requester is not None:
            self._requesters[requester.name] = requester.waiting_tokens, time.monotonic()
        try:
            yield
        finally:
            if requester is not None and requester.name in self._requesters:
                waiting, seen_at = self._requesters[requester.name]
                self._requesters[requester.name] = max(0, waiting - tokens), seen_at

    def waiting_tokens(self) -> int:
        """Return the sum over the requesters with a request in the last `_REMEMBER_SECONDS`."""
        oldest = time.monotonic() - _REMEMBER_SECONDS
        self._requesters = {name: entry for name, entry in self._requesters.items() if entry[1] >= oldest}
        return sum(waiting for waiting, _ in self._requesters.values())


class WaitingTokensPolicy:
    """Serve autoscaling policy: one replica per `tokens_per_replica` waiting tokens.

    - Scale up to ⌈waiting tokens / `tokens_per_replica`⌉ replicas if these are more than the current target.
    - Scale down by one replica if fewer than a quarter of `tokens_per_replica` tokens per target replica are waiting.
      The threshold is low because few tokens wait when the replicas just keep up with the requests, and one replica
      fewer would not keep up.
    - Scale to zero if there are no requests, unless the first replica is still loading.

    Serve then applies the configured delays, and the minimum and maximum.
    """

    def __init__(self, tokens_per_replica: int):
        self.tokens_per_replica = tokens_per_replica

    def __call__(self, context: Any) -> tuple[int, dict]:
        """Return the target number of replicas, and an empty state, as Serve expects of a policy.

        Args:
            context: Serve's `AutoscalingContext`.
        """
        reported = (context.aggregated_metrics or {}).get(METRIC, {})
        # An old replica has had requests from nearly all requesters, a new one from none: the largest sum is the best
        # estimate.
        waiting = max(reported.values(), default=0.0)
        loading = context.target_num_replicas > 0 and not context.running_replicas
        if waiting == 0 and context.total_num_requests == 0 and not loading:
            return 0, {}
        current, needed = context.target_num_replicas, math.ceil(waiting / self.tokens_per_replica)
        if needed > current:
            return needed, {}
        if waiting < 0.25 * self.tokens_per_replica * current:
            return max(1, needed, current - 1), {}
        return max(1, current), {}
