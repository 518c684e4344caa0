"""Send requests to a Serve application: limited by credit, and retried until a deadline if a replica dies."""

import asyncio
import inspect
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ray import serve
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
)
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    wait_exponential_jitter,
)

from rayk.errors import EngineDied, InputError, RaykError
from rayk.serving import application as applications
from rayk.serving.autoscaling import Requester
from rayk.serving.credit import Credit
from rayk.signals.batch import CorruptSignal

# A replica, its engine or its node died; an object was lost with its node; a queue is full; a reply was damaged.
_RETRYABLE = (RayActorError, ObjectLostError, EngineDied, BackPressureError, DeploymentUnavailableError, CorruptSignal)
T = TypeVar("T")


@dataclass
class Statistics:
    """Totals of one client since its creation."""

    calls: int = 0
    retries: int = 0
    tokens: int = 0
    """Counted tokens with signals, from a replica or the cache."""
    cached_tokens: int = 0
    """The part of `tokens` that came from the cache."""
    bytes: int = 0
    wait_seconds: float = 0.0
    """Time that callers spent waiting in `stream`, `score` and `generate`."""


class ServedModel:
    """Client of one Serve application. Its methods run on the background event loop only."""

    label: str
    """Name of the application in errors."""
    section: str
    """Section of the application's settings, for errors."""
    unavailable: type[RaykError]
    """Raised if no replica answers before the deadline."""

    def __init__(self, application: str, *, in_flight: int, deadline_seconds: float):
        self.statistics = Statistics()
        self._deadline_seconds = deadline_seconds
        self._handle = serve.get_deployment_handle(applications.DEPLOYMENT, app_name=application).options(
            _by_reference=True
        )
        self._credit = Credit(application, in_flight)
        self._requester = f"{socket.gethostname()}-{os.getpid()}-{id(self)}"
        self._waiting_tokens = 0

    async def _call(self, method: str, request: Any, read: Callable[[Any], T | Awaitable[T]]) -> T:
        """Acquire credit, send one request, and retry until a replica answers or the deadline passes.

        The deadline starts when the credit is acquired.

        Args:
            read: converts the replica's result; may be asynchronous. A `CorruptSignal` from it causes a retry.
        """
        tokens = getattr(request, "tokens", 0)
        self._waiting_tokens += tokens
        try:
            async with self._credit:
                self.statistics.calls += 1
                return await self._call_without_credit(method, request, read)
        finally:
            self._waiting_tokens -= tokens

    async def _call_without_credit(self, method: str, request: Any, read: Callable[[Any], T | Awaitable[T]]) -> T:
        """Like `_call`, but without credit: for requests that a replica answers without computing."""
        last: BaseException | None = None

        def record_retry(state: RetryCallState) -> None:
            nonlocal last
            last = state.outcome.exception() if state.outcome else None
            self.statistics.retries += 1

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_RETRYABLE),
            wait=wait_exponential_jitter(initial=0.1, max=5.0),
            before_sleep=record_retry,
        )
        try:
            # Serve itself waits forever while no replica runs, so the deadline is enforced here.
            async with asyncio.timeout(self._deadline_seconds):
                return await retrying(self._attempt, method, request, read)
        except TimeoutError as error:
            raise self.unavailable(self._no_answer(last)) from (last or error)

    async def _attempt(self, method: str, request: Any, read: Callable[[Any], T | Awaitable[T]]) -> T:
        response = getattr(self._handle, method).remote(request, Requester(self._requester, self._waiting_tokens))
        try:
            result = read(await response)
            return await result if inspect.isawaitable(result) else result
        except asyncio.CancelledError:
            response.cancel()
            raise
        except RayTaskError as error:
            if isinstance(error.cause, InputError):
                raise InputError(str(error.cause)) from None
            if isinstance(error, _RETRYABLE):
                raise
            reason = str(error.cause) if isinstance(error.cause, RaykError) else repr(error.cause)
            raise RaykError(f"{self.label} failed at {method}: {reason}") from error
        except RayServeException as error:
            if isinstance(error, _RETRYABLE):
                raise
            raise self.unavailable(self._no_answer(error)) from error

    def _no_answer(self, reason: BaseException | None) -> str:
        because = f" ({type(reason).__name__})" if reason else ""
        return (
            f"{self.label} did not answer within {self._deadline_seconds:g} s{because}; check that its replicas run, "
            f"or raise {self.section}.deadline_seconds."
        )
