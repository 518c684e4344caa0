"""How many replicas a teacher needs, from what its askers wait for.

Serve's own measure, requests in flight, says little here: askers bound them by credit. So each request says how many
tokens its asker is still waiting for in all, and replicas report the sum over the askers they have heard of lately.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_HEARD_SECONDS = 15.0
METRIC = "waiting_tokens"


@dataclass(frozen=True)
class Requester:
    """Who asks, and the tokens of all its requests that have no answer yet."""

    name: str
    waiting_tokens: int


class Demand:
    """What one replica knows of its askers' waiting tokens."""

    def __init__(self) -> None:
        self._heard: dict[str, tuple[int, float]] = {}

    @contextmanager
    def answering(self, asker: Requester | None, tokens: int) -> Iterator[None]:
        """Take up what a request of `tokens` says; once it is answered, less is waited for."""
        if asker is not None:
            self._heard[asker.name] = asker.waiting_tokens, time.monotonic()
        try:
            yield
        finally:
            if asker is not None and asker.name in self._heard:
                waiting, heard = self._heard[asker.name]
                self._heard[asker.name] = max(0, waiting - tokens), heard

    def waiting_tokens(self) -> int:
        """Sum over askers heard of in the last seconds."""
        oldest = time.monotonic() - _HEARD_SECONDS
        self._heard = {name: heard for name, heard in self._heard.items() if heard[1] >= oldest}
        return sum(waiting for waiting, _ in self._heard.values())


class WaitingTokensPolicy:
    """Serve's autoscaling policy: replicas for `tokens_a_replica` waiting tokens each.

    Up as soon as more than that wait; down by one when less than a quarter does, so that a teacher that keeps up is not
    taken away for keeping up; to none when nobody asks, unless the first replica is still loading. Serve applies its
    delays and the bounds.
    """

    def __init__(self, tokens_a_replica: int):
        self.tokens_a_replica = tokens_a_replica

    def __call__(self, context: Any) -> tuple[int, dict]:
        """The replicas that Serve's AutoscalingContext calls for, and no state."""
        reported = (context.aggregated_metrics or {}).get(METRIC, {})
        # Each replica has heard nearly every asker, a new one nobody yet: the largest sum is the nearest.
        waiting = max(reported.values(), default=0.0)
        loading = context.target_num_replicas > 0 and not context.running_replicas
        if waiting == 0 and context.total_num_requests == 0 and not loading:
            return 0, {}
        current, enough = context.target_num_replicas, math.ceil(waiting / self.tokens_a_replica)
        if enough > current:
            return enough, {}
        if waiting < 0.25 * self.tokens_a_replica * current:
            return max(1, enough, current - 1), {}
        return max(1, current), {}
