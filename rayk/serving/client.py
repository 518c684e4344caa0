"""Send requests to a Serve application: limited by credit, retried if a replica dies, sent to a second replica if the
first does not answer, and given up when nothing has been answered for the deadline."""

import asyncio
import inspect
import os
import socket
import time
from collections.abc import Awaitable, Callable
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
from rayk.serving.metrics import Statistics
from rayk.serving.patience import POLL_SECONDS, Patience
from rayk.signals.wire import CorruptSignal

# A replica, its engine or its node died; an object was lost with its node; a queue is full; a reply was damaged.
_RETRYABLE = (RayActorError, ObjectLostError, EngineDied, BackPressureError, DeploymentUnavailableError, CorruptSignal)
T = TypeVar("T")


class ServedModel:
    """Client of one Serve application. Its methods run on the background event loop only."""

    label: str
    """Name of the application in errors."""
    section: str
    """Section of the application's settings, for errors."""
    unavailable: type[RaykError]
    """Raised if no replica answers before the deadline."""

    def __init__(self, application: str, *, in_flight: int, deadline_seconds: float, load_seconds: float = 0.0):
        """
        Args:
            load_seconds: time that a replica takes to load the model.
        """
        self.statistics = Statistics(application)
        self._application = application
        self._patience = Patience(deadline_seconds, load_seconds)
        self._handle = serve.get_deployment_handle(applications.DEPLOYMENT, app_name=application).options(
            _by_reference=True
        )
        self._credit = Credit(application, in_flight)
        self._requester = f"{socket.gethostname()}-{os.getpid()}-{id(self)}"
        self._waiting_tokens = 0

    async def _call(self, method: str, request: Any, read: Callable[[Any], T | Awaitable[T]]) -> T:
        """Acquire credit, send one request, and retry until a replica answers or the application makes no progress
        (`Patience`).

        Args:
            read: converts the replica's result; may be asynchronous. A `CorruptSignal` from it causes a retry.
        """
        tokens = getattr(request, "tokens", 0)
        self._waiting_tokens += tokens
        try:
            async with self._credit:
                self.statistics.add(calls=1)
                return await self._call_without_credit(method, request, read)
        finally:
            self._waiting_tokens -= tokens

    async def _call_without_credit(self, method: str, request: Any, read: Callable[[Any], T | Awaitable[T]]) -> T:
        """Like `_call`, but without credit: for requests that a replica answers without computing."""
        last: BaseException | None = None

        def record_retry(state: RetryCallState) -> None:
            nonlocal last
            last = state.outcome.exception() if state.outcome else None
            self.statistics.add(retries=1)

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_RETRYABLE),
            wait=wait_exponential_jitter(initial=0.1, max=5.0),
            before_sleep=record_retry,
        )
        began = time.monotonic()
        answer: asyncio.Future[T] = asyncio.ensure_future(retrying(self._attempt, method, request, read))
        try:
            # Serve itself waits forever while no replica runs, so the deadline is enforced here.
            while not (await asyncio.wait([answer], timeout=max(0.0, self._patience.remaining(began))))[0]:
                if self._patience.remaining(began) > 0:
                    continue
                if not await asyncio.to_thread(applications.is_loading, self._application):
                    raise self.unavailable(self._no_answer(last)) from last
                if not self._patience.note_loading():
                    raise self.unavailable(self._no_answer(last)) from last
                await asyncio.wait([answer], timeout=POLL_SECONDS)
            return answer.result()
        finally:
            answer.cancel()

    async def _attempt(self, method: str, request: Any, read: Callable[[Any], T | Awaitable[T]]) -> T:
        """Send a request, and send it to another replica, too, if the answer takes unusually long: the first replica
        may hang, which Serve notices only after a minute. The answer depends on the request only."""
        began = time.monotonic()
        pending = {asyncio.ensure_future(self._send(method, request, read))}
        copies, all_sent = 1, pending.copy()
        try:
            while True:
                done, pending = await asyncio.wait(
                    pending, timeout=self._patience.ask_again_seconds(method), return_when=asyncio.FIRST_COMPLETED
                )
                for sent in done:
                    error = sent.exception()
                    if error is None:
                        self._patience.note_answer(method, time.monotonic() - began)
                        return sent.result()
                    if not pending or not isinstance(error, _RETRYABLE):
                        raise error
                if not done and copies < await self._credit.replicas():
                    copies += 1
                    self.statistics.add(asked_again=1)
                    pending.add(asyncio.ensure_future(self._send(method, request, read)))
                    all_sent |= pending
        finally:
            for sent in all_sent:
                sent.cancel()

    async def _send(self, method: str, request: Any, read: Callable[[Any], T | Awaitable[T]]) -> T:
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
            f"{self.label} did not answer within {self._patience.seconds:g} s{because}; check that its replicas run, "
            f"or raise {self.section}.deadline_seconds."
        )
