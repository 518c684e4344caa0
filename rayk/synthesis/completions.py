"""Request completions from a model and cache them in the store.

A recipe is plain code that requests completions from a client. Completions in the store are not requested again, so an
interrupted recipe continues when it is run again. This requires that equal responses lead to equal requests: randomness
must come from `CompletionClient.seed`, by the position of a row, never from the order in which responses arrive.
"""

import asyncio
import contextlib
import datetime
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np

from rayk.config import SynthesisSettings
from rayk.engines.batching import gather
from rayk.errors import RaykError, RunFailed, TeacherUnavailable
from rayk.synthesis.prompt_format import PromptFormat
from rayk.synthesis.requests import CompletionRequest
from rayk.synthesis.store import CompletionStore, StoredCompletion
from rayk.synthesis.usage import EndpointMeter, UsageTracker
from rayk.teachers import Teacher
from rayk.teachers.client import Completion
from rayk.text.thoughts import mark_separate_thought, mark_thought
from rayk.text.words import whole_characters

_FLUSH_COMPLETIONS = 256
_FLUSH_SECONDS = 2.0
_MAX_UNANSWERED_IN_A_ROW = 32
_MAX_REFUSED_AT_START = 256


class CompletionClient:
    """Requests completions and caches them in the store.

    At most `settings.in_flight` requests run at a time. An async context manager: at its end, also when it is
    cancelled, all completions received are on disk.

    Args:
        tracker: usage tracker shared by the clients of a store; by default a new one.
        role: "student", "referee" or "judge"; empty for the teacher that generates the rows. It distinguishes equal
            requests and is part of the provenance.
        chat: overrides `settings.chat`.
        prefers_chat: whether the chat template is used, if the tokenizer has one and the settings do not decide.
        template: the text of a chat template, instead of the tokenizer's own.
        date: the date that a chat template prints which asks for today's; None: today.

    Attributes:
        teacher: model that is queried.
        date: as above; a recipe that renders a chat template itself uses it too.

    Raises:
        InputError: prompts are to be wrapped in a chat template, but the tokenizer has none, or the model is an
            endpoint, which has its own.
    """

    def __init__(
        self, teacher: Teacher, store: CompletionStore, settings: SynthesisSettings, seed: int = 0,
        tracker: UsageTracker | None = None, *, role: str = "", chat: bool | None = None, prefers_chat: bool = False,
        template: str | None = None, date: datetime.date | None = None,
    ):  # fmt: skip
        self.store, self.tracker = store, tracker or UsageTracker(store.usage)
        self._seed, self._role, self.date = seed, role, date
        in_flight = teacher.settings.model_copy(update={"in_flight": settings.in_flight})
        self.teacher = Teacher(teacher.name, teacher.info, in_flight)
        chat = settings.chat if chat is None else chat
        self._format = PromptFormat(teacher.info, teacher.settings, chat, prefers_chat, template, date)
        self._end_token_ids = self._format.trained_ends() if role == "student" else ()
        self._meter = EndpointMeter(self.teacher)
        self._slots = asyncio.Semaphore(settings.in_flight)
        self._closed = asyncio.Event()
        self._occurrences: Counter[str] = Counter()
        self._unanswered_in_a_row = 0
        self._has_answered = False
        self._early_refusals: list[tuple[StoredCompletion, dict[str, Any]]] = []  # before the first completion
        self._failure: RaykError | None = None

    async def __aenter__(self) -> "CompletionClient":
        await self._meter.start()
        self.tracker.meters.append(self._meter)
        self._flushing = asyncio.create_task(self._flush_regularly())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closed.set()
        try:
            await self._flushing
        finally:
            try:
                await self._flush()
            finally:
                self.tracker.meters.remove(self._meter)

    @property
    def total(self) -> int:
        """Number of completions that the recipe needs from all clients of the store; set by the recipe."""
        return self.tracker.total

    @total.setter
    def total(self, total: int) -> None:
        self.tracker.total = total

    @property
    def done(self) -> int:
        """Number of completions available so far."""
        return self.tracker.done

    @property
    def uses_chat(self) -> bool:
        """Whether the model reads prompts as user messages of a chat."""
        return self._format.is_chat

    def seed(self, *position: int) -> int:
        """Derive a seed from the run's seed and a position (stage, row, sample, …)."""
        return int(np.random.SeedSequence([self._seed, *position]).generate_state(1, np.uint64)[0])

    async def complete_all(self, requests: Iterable[CompletionRequest]) -> list[StoredCompletion]:
        """Return a completion for each request, in order; see `complete`."""
        return await gather(self.complete(request) for request in requests)

    async def complete(self, request: CompletionRequest) -> StoredCompletion:
        """Return the completion of a request, from the store or from the model.

        A failed request returns `finish_reason` 'error'. If it was `refused` for good, the refusal is stored like a
        completion; otherwise another run requests it again.

        Raises:
            RunFailed: the model answers no request at all, or the disk is full.
            TeacherUnavailable, InputError: as `Teacher.generate`.
        """
        key = self._key(request)
        completion = self.store.find(key)
        if completion is None:
            async with self._slots:
                if self._failure is not None:
                    raise self._failure
                try:
                    completion = await self._request(key, request)
                except RaykError as error:  # so that requests that wait for this slot are not sent any more
                    self._failure = error
                    raise
        else:
            self._has_answered = True
        if self._has_answered:
            self._store_early_refusals()
        self.tracker.done += 1
        self.tracker.report()
        return self._format.without_thought(completion)

    def _key(self, request: CompletionRequest) -> str:
        """Key of a request. Equal requests are numbered, so that each gets a completion of its own."""
        info = self.teacher.info
        identity = [
            request.prompt, request.sampling, request.seed, info.engine,
            info.weights_fingerprint or info.model, self._format.wraps if request.raw_prompt is None else "sent",
            *filter(None, [self._role, request.messages, request.tools, self._format.identity]),
        ]  # fmt: skip
        digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()
        self._occurrences[digest] += 1
        return f"{digest}-{self._occurrences[digest]}"

    async def _request(self, key: str, request: CompletionRequest) -> StoredCompletion:
        prompt = self._format.format(request)
        if reason := self._format.length_error(prompt, request.parameters):
            return StoredCompletion(key, "", None, None, "error", reason, refused=True)
        try:
            parameters = replace(request.parameters, end_token_ids=self._end_token_ids)
            received = (await self.teacher.agenerate([prompt.sent], parameters, [request.seed]))[0]
        except TeacherUnavailable as error:
            if self.teacher.info.engine != "openai":
                raise
            return self._record_failure(key, str(error))
        self.tracker.requested += 1
        self._meter.has_unbilled = True
        if received.finish_reason == "error" and not received.refused:
            return self._record_failure(key, received.reason)
        completion = _to_stored(key, received, prompt.read)
        provenance = {
            "prompt": prompt.text, "parameters": json.dumps(request.sampling), "seed": request.seed,
            "teacher": self._role or self.teacher.name, "model": self.teacher.info.model,
            "weights": self.teacher.info.weights_fingerprint, "written_at_seconds": time.time(),
        }  # fmt: skip
        if completion.refused:
            self._record_refusal(completion, provenance)
        else:
            self._unanswered_in_a_row, self._has_answered = 0, True
            self.tracker.tokens += completion.tokens or 0
            self.store.add(completion, provenance)
        if self.store.num_pending >= _FLUSH_COMPLETIONS:
            await self._flush()
        return completion

    def _record_failure(self, key: str, reason: str) -> StoredCompletion:
        """Count a failed request. The run continues without it, but stops after many failures in a row."""
        self.tracker.unanswered += 1
        self._unanswered_in_a_row += 1
        if self._unanswered_in_a_row >= _MAX_UNANSWERED_IN_A_ROW:
            self._fail(f"did not answer {self._unanswered_in_a_row} requests in a row; the last error: {reason}")
        return StoredCompletion(key, "", None, None, "error", reason)

    def _record_refusal(self, refusal: StoredCompletion, provenance: dict[str, Any]) -> None:
        """Count a refused request. Refusals are stored once the model has answered any request: until then its settings
        may be at fault rather than the prompts, and after their correction the prompts are requested again."""
        self.tracker.refused += 1
        self._unanswered_in_a_row = 0
        self._early_refusals.append((refusal, provenance))
        if not self._has_answered and len(self._early_refusals) >= _MAX_REFUSED_AT_START:
            self._fail(f"refused the first {len(self._early_refusals)} requests; the last error: {refusal.reason}")

    def _store_early_refusals(self) -> None:
        for refusal, provenance in self._early_refusals:
            self.store.add(refusal, provenance)
        self._early_refusals.clear()

    def _fail(self, problem: str) -> NoReturn:
        self._failure = RunFailed(
            f"Teacher '{self.teacher.name}' {problem}. Earlier completions are kept; check the teacher and run again."
        )
        raise self._failure

    async def _flush_regularly(self) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closed.wait(), _FLUSH_SECONDS)
            try:
                await self._flush()
            except RaykError as error:
                self._failure = error
                return

    async def _flush(self) -> None:
        """Write new completions to disk, after the charges for them, so that a kill in between loses no charge."""
        async with self.tracker.flush_lock:
            keys = self.store.pending_keys
            if not keys and not self.tracker.has_unbilled:
                return
            await self.tracker.update_charges()
            await asyncio.to_thread(self._write, keys)

    def _write(self, keys: set[str]) -> None:
        try:
            if (charges := self.tracker.charges) != self.store.usage:
                self.store.usage = charges
        finally:
            self.store.flush(keys)


def _to_stored(key: str, completion: Completion, read: str | None) -> StoredCompletion:
    """Return a completion as it is stored: with its thought, if it has one, between marks before the answer.

    Args:
        read: the text that the model read; None if unknown.
    """
    text = mark_thought(completion.text, read)
    if completion.thought:
        text = mark_separate_thought(
            completion.thought, completion.text, is_truncated=completion.finish_reason == "length"
        )
    # float32 as in the store, so that new and stored completions are equal.
    logprobs = completion.logprobs
    mean_logprob = float(np.float32(np.mean(logprobs, dtype=np.float64))) if len(logprobs) else None
    return StoredCompletion(
        key, whole_characters(text), len(completion.token_ids) or None, mean_logprob,
        completion.finish_reason, whole_characters(completion.reason), completion.refused,
    )  # fmt: skip
