"""rayk's own metrics for Prometheus. Ray exports them on every node, beside its own, with the prefix `ray_`; counters
also get the suffix `_total`."""

import functools
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.util.metrics import Counter, Gauge

from rayk.serving.autoscaling import Demand, Requester

COUNTERS = {
    "rayk_scored_tokens": "tokens that replicas have read to score them",
    "rayk_generated_tokens": "tokens that replicas have generated",
    "rayk_client_calls": "calls to replicas, without repeated ones",
    "rayk_client_retries": "calls that were repeated, because a replica or its reply was lost",
    "rayk_client_asked_again": "calls that were sent to a second replica, because the first took unusually long",
    "rayk_client_tokens": "counted tokens with signals, from replicas or the cache",
    "rayk_client_cached_tokens": "the part of them from the cache",
    "rayk_client_bytes": "bytes of received signals",
    "rayk_client_wait_seconds": "seconds that callers have waited in `stream`, `score` and `generate`",
    "rayk_run_tokens": "tokens of the rows that a run has trained on",
    "rayk_run_cached_tokens": "counted tokens of a run from its signal cache",
    "rayk_run_skipped_rows": "rows that a run has left out",
    "rayk_run_seconds": "seconds of a run's steps",
    "rayk_run_teacher_wait_seconds": "the part of them in which the first worker waited for its batch",
    "rayk_run_policy_wait_seconds": "the part of them in which it waited for its rollouts",
}
"""Names and meanings of metrics that only grow."""
GAUGES = {
    "rayk_waiting_tokens": "tokens of unanswered requests, as a replica knows from its requesters",
    "rayk_run_step": "a run's last step",
    "rayk_run_loss": "the loss of that step",
    "rayk_run_staleness": "mean age of the rollouts of that step, in optimizer steps",
    "rayk_run_student_mass": "the student's probability on the tokens in the teacher's signal, in that step",
    "rayk_run_restarts": "how often the run's workers have started again, after a failure or with `--resume`",
}
"""Names and meanings of metrics with a current value."""


_SMALLEST = sys.float_info.min
"""Instead of 0, with which Ray does not create a counter; it changes no total."""


def tag_of(name: str) -> str:
    """Return the metric's tag: `run` or, of metrics about replicas and requests, `application`."""
    return "run" if name.startswith("rayk_run_") else "application"


@functools.cache
def _counter(name: str) -> Counter:
    return Counter(name, COUNTERS[name], (tag_of(name),))


@functools.cache
def _gauge(name: str) -> Gauge:
    return Gauge(name, GAUGES[name], (tag_of(name),))


def create_counters(prefix: str, tag: str) -> None:
    """Export the counters whose names begin with `prefix` before their first increase, which Prometheus would not see:
    it computes increases from the first value that it has read."""
    for name in COUNTERS:
        if name.startswith(prefix):
            add(name, _SMALLEST, tag)


def add(name: str, amount: float, tag: str) -> None:
    """Add to a counter; `tag` is the name of the application or run."""
    if amount > 0 and ray.is_initialized():
        _counter(name).inc(float(amount), {tag_of(name): tag})


def show(name: str, value: float, tag: str) -> None:
    """Set a gauge; `tag` is the name of the application or run."""
    if ray.is_initialized():
        _gauge(name).set(float(value), {tag_of(name): tag})


@dataclass
class Statistics:
    """Totals of one client since its creation. `add` changes them, and the metrics `rayk_client_…`."""

    application: str
    calls: int = 0
    retries: int = 0
    asked_again: int = 0
    """Requests that were sent to a second replica because the first had not answered."""
    tokens: int = 0
    """Counted tokens with signals, from a replica or the cache."""
    cached_tokens: int = 0
    """The part of `tokens` that came from the cache."""
    bytes: int = 0
    wait_seconds: float = 0.0
    """Time that callers spent waiting in `stream`, `score` and `generate`."""

    def __post_init__(self) -> None:
        create_counters("rayk_client_", self.application)

    def add(self, **amounts: float) -> None:
        """Add to totals, by name."""
        for name, amount in amounts.items():
            setattr(self, name, getattr(self, name) + amount)
            add(f"rayk_client_{name}", amount, self.application)


class MeasuredDemand(Demand):
    """`Demand` of the replica in this process that is also a metric, as are the tokens that the replica computes."""

    def __init__(self) -> None:
        super().__init__()
        self._application = serve.get_replica_context().app_name
        for prefix in ("rayk_scored_", "rayk_generated_"):
            create_counters(prefix, self._application)

    @contextmanager
    def track_request(self, requester: Requester | None, tokens: int) -> Iterator[None]:
        """See `Demand`."""
        try:
            with super().track_request(requester, tokens):
                self._show()
                yield
        finally:
            self._show()

    def count(self, *, scored: int = 0, generated: int = 0) -> None:
        """Count tokens that the replica has scored or generated."""
        add("rayk_scored_tokens", scored, self._application)
        add("rayk_generated_tokens", generated, self._application)

    def _show(self) -> None:
        show("rayk_waiting_tokens", self.waiting_tokens(), self._application)


_COUNTED_COLUMNS = {
    "tokens": "rayk_run_tokens", "cached_tokens": "rayk_run_cached_tokens", "skipped_rows": "rayk_run_skipped_rows",
    "step_seconds": "rayk_run_seconds", "teacher_wait_seconds": "rayk_run_teacher_wait_seconds",
    "policy_wait_seconds": "rayk_run_policy_wait_seconds",
}  # fmt: skip
_SHOWN_COLUMNS = {
    "step": "rayk_run_step", "loss": "rayk_run_loss", "rollout_staleness": "rayk_run_staleness",
    "student_mass": "rayk_run_student_mass",
}  # fmt: skip
"""Metrics of a run by the column of `metrics.jsonl`."""


@dataclass(frozen=True)
class RunMetrics:
    """The metrics `rayk_run_…` of one run.

    Attributes:
        restarts: number of attempts before this one.
    """

    run: str
    restarts: int = 0

    def __post_init__(self) -> None:
        create_counters("rayk_run_", self.run)

    def record(self, row: Mapping[str, Any]) -> None:
        """Export a row of `metrics.jsonl`."""
        for column, name in _COUNTED_COLUMNS.items():
            add(name, row.get(column, 0), self.run)
        for column, name in _SHOWN_COLUMNS.items():
            if column in row:
                show(name, row[column], self.run)
        show("rayk_run_restarts", self.restarts, self.run)
