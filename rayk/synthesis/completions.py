"""Request completions from a model and cache them in the store.

A recipe is plain code that requests completions from a client. Completions in the store are not requested again, so an
interrupted recipe continues when it is run again. This requires that equal responses lead to equal requests: randomness
must come from `CompletionClient.seed`, by the position of a row, never from the order in which responses arrive.
"""

import asyncio
import contextlib
import hashlib
import json
import time
from collections import Counter
from collections.abc import AsyncGenerator, Coroutine, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn, TypeVar

import numpy as np

from rayk.config import SynthesisSettings
from rayk.data.chat_template import ChatTemplate
from rayk.data.text_encoder import TextEncoder
from rayk.engines.base import SamplingParameters
from rayk.engines.batching import gather
from rayk.errors import InputError, RaykError, RunFailed, TeacherUnavailable
from rayk.models import load_generation_config, load_tokenizer
from rayk.models.ends import end_token_ids
from rayk.synthesis.store import CompletionStore, StoredCompletion
from rayk.synthesis.usage import UsageTracker, add_usage
from rayk.teachers import Teacher
from rayk.teachers.client import Completion
from rayk.text.thoughts import mark_separate_thought, mark_thought, split_thought
from rayk.text.words import whole_characters

_FLUSH_COMPLETIONS = 256
_FLUSH_SECONDS = 2.0
_USAGE_SECONDS = 5.0
_MAX_UNANSWERED_IN_A_ROW = 32
_MAX_REFUSED_AT_START = 256
T = TypeVar("T")


@dataclass(frozen=True)
class CompletionRequest:
    """Request for one completion.

    Attributes:
        prompt: text that the model is asked to complete or answer.
        messages: the conversation that the model is asked to continue, if it is more than `prompt` as a user's message;
            it needs a chat template. See `rayk.synthesis.Prompt.request`.
        tools: schemas of the tools that the conversation's assistant may call.
        raw_prompt: exact text that the model reads, if the recipe has formatted the prompt itself: neither the chat
            template nor the tokenizer's prefix is added. The store still finds the request by `prompt`, because a
            template may insert the current date.
    """

    prompt: str
    seed: int
    parameters: SamplingParameters
    raw_prompt: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: list[dict[str, Any]] | None = None


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

    Attributes:
        teacher: model that is queried.

    Raises:
        InputError: prompts are to be wrapped in a chat template, but the tokenizer has none, or the model is an
            endpoint, which has its own.
    """

    def __init__(
        self, teacher: Teacher, store: CompletionStore, settings: SynthesisSettings, seed: int = 0,
        tracker: UsageTracker | None = None, *, role: str = "", chat: bool | None = None, prefers_chat: bool = False,
        template: str | None = None,
    ):  # fmt: skip
        self.store, self.tracker = store, tracker or UsageTracker(store.usage)
        self._settings, self._seed, self._role = settings, seed, role
        chat = settings.chat if chat is None else chat
        self._chat = bool(chat)
        in_flight = teacher.settings.model_copy(update={"in_flight": settings.in_flight})
        self.teacher = Teacher(teacher.name, teacher.info, in_flight)
        self._encoder = None
        if self._chat and teacher.info.engine == "openai":
            raise InputError(
                f"synthesis.chat: teacher '{teacher.name}' is an endpoint, which has a chat template of its own; "
                "remove synthesis.chat."
            )
        self._variables = {**teacher.settings.chat_template_kwargs, **({"template": template} if template else {})}
        if teacher.info.engine != "openai":
            tokenizer = load_tokenizer(teacher.info.model, trust_remote_code=teacher.settings.trust_remote_code)
            chat_template = ChatTemplate(tokenizer, template, teacher.settings.chat_template_kwargs)
            self._encoder = TextEncoder(tokenizer, chat_template)
            has_template = bool(template or tokenizer.chat_template)
            self._chat = has_template and prefers_chat if chat is None else chat
            if self._chat and not has_template:
                check_chat_template(tokenizer, teacher.name)
        self._end_token_ids = self._find_ends(self._encoder) if role == "student" and self._encoder else ()
        self._slots = asyncio.Semaphore(settings.in_flight)
        self._closed = asyncio.Event()
        self._occurrences: Counter[str] = Counter()
        self._unanswered_in_a_row = 0
        self._has_answered = False
        self._early_refusals: list[tuple[StoredCompletion, dict[str, Any]]] = []  # before the first completion
        self._failure: RaykError | None = None
        self.has_unbilled = False
        self._charges_of_lost_replicas: dict[str, Any] = {}
        self._charges: dict[str, Any] = {}
        self._usage_at_start: dict[str, Any] = {}
        self._last_usage: dict[str, Any] = {}

    async def __aenter__(self) -> "CompletionClient":
        self._usage_at_start = self._last_usage = await self._endpoint_usage()
        self.tracker.clients.append(self)
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
                self.tracker.clients.remove(self)

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
        return self._chat or self.teacher.info.applies_chat_template

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
                completion = await self._request(key, request)
        else:
            self._has_answered = True
        if self._has_answered:
            self._store_early_refusals()
        self.tracker.done += 1
        self.tracker.report()
        return self._without_thought(completion)

    def _key(self, request: CompletionRequest) -> str:
        """Key of a request. Equal requests are numbered, so that each gets a completion of its own."""
        info = self.teacher.info
        identity = [
            request.prompt, _to_dict(request.parameters), request.seed, info.engine,
            info.weights_fingerprint or info.model, self._chat if request.raw_prompt is None else "sent",
            *filter(None, [self._role, request.messages, request.tools, self._endpoint_body or self._variables]),
        ]  # fmt: skip
        digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()
        self._occurrences[digest] += 1
        return f"{digest}-{self._occurrences[digest]}"

    async def _request(self, key: str, request: CompletionRequest) -> StoredCompletion:
        text, prompt, read = self._format_prompt(request)
        if reason := self._length_error(prompt, request.parameters):
            return StoredCompletion(key, "", None, None, "error", reason, refused=True)
        try:
            parameters = replace(request.parameters, end_token_ids=self._end_token_ids)
            received = (await self.teacher.agenerate([prompt], parameters, [request.seed]))[0]
        except TeacherUnavailable as error:
            if self.teacher.info.engine != "openai":
                raise
            return self._record_failure(key, str(error))
        self.tracker.requested += 1
        self.has_unbilled = True
        if received.finish_reason == "error" and not received.refused:
            return self._record_failure(key, received.reason)
        completion = _to_stored(key, received, read)
        provenance = {
            "prompt": text, "parameters": json.dumps(_to_dict(request.parameters)), "seed": request.seed,
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

    def _format_prompt(self, request: CompletionRequest) -> tuple[str, Any, str | None]:
        """Return what the model reads: as text for the provenance, as it is sent (text, messages, or token ids [n]
        int32), and all of it as text; None if that is unknown, for an endpoint with a chat template.

        Raises:
            InputError: the chat template fails, or a conversation is sent to a model that reads no chat.
        """
        prompt = request.prompt if request.raw_prompt is None else request.raw_prompt
        messages = [dict(message) for message in request.messages]
        if messages and not self.uses_chat:
            raise InputError(
                f"A prompt with {len(messages)} messages can only be sent in a chat template, and teacher "
                f"'{self.teacher.name}' reads plain text; set synthesis.chat: true (for an endpoint: engine.chat)."
            )
        if self._encoder is None:
            if request.tools:
                raise InputError(
                    f"Rows with tools cannot be sent to teacher '{self.teacher.name}', an endpoint, whose calls of "
                    "tools would be lost; remove the rows, or set tools_field to null to leave the tools out."
                )
            return prompt, messages or prompt, None if self.uses_chat else prompt
        if request.raw_prompt is not None:
            return prompt, np.asarray(self._encoder.encode([prompt])[0], np.int32), prompt
        if not self._chat:
            return prompt, np.asarray(self._encoder.prompts([prompt])[0], np.int32), prompt
        messages = messages or [{"role": "user", "content": prompt}]
        ids = self._encoder.chat_prompt(messages, "synthesis.chat", request.tools)
        read = self._encoder.tokenizer.decode(ids)
        return read, np.asarray(ids, np.int32), read

    @property
    def _endpoint_body(self) -> dict[str, Any]:
        """The fields that the settings add to the body of requests to an endpoint."""
        return getattr(self.teacher.settings.engine, "extra_body", {}) if self._encoder is None else {}

    def _without_thought(self, completion: StoredCompletion) -> StoredCompletion:
        """Return a completion with its thought apart from its text. One that ends in its thought is truncated."""
        split = split_thought(completion.text)
        if split.answer == completion.text and not split.is_cut:
            return completion
        tokens = completion.tokens
        if tokens is not None and self._encoder is not None:
            tokens = len(self._encoder.encode([split.answer])[0])
        return replace(
            completion, text=split.answer, tokens=tokens, thought=split.thought, is_cut_in_thought=split.is_cut,
            finish_reason="length" if split.is_cut else completion.finish_reason,
        )  # fmt: skip

    def _find_ends(self, encoder: TextEncoder) -> tuple[int, ...]:
        """Return the ids that end the student's completions: its own, and the one that its training teaches."""
        question = {"role": "user", "content": "a"}
        end = encoder.end_of_answer([question], "synthesis") if self._chat else encoder.eos_id
        settings = load_generation_config(
            self.teacher.info.model, trust_remote_code=self.teacher.settings.trust_remote_code
        )
        return end_token_ids(settings, encoder.tokenizer, () if end is None else (end,))

    def _length_error(self, prompt: Any, parameters: SamplingParameters) -> str:
        limit = self.teacher.info.max_tokens
        if not isinstance(prompt, np.ndarray) or len(prompt) + parameters.max_new_tokens <= limit:
            return ""
        return (
            f"the prompt of {len(prompt)} tokens leaves no room for {parameters.max_new_tokens} new tokens: the model "
            f"is limited to {limit}"
        )

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
            if not keys and not any(client.has_unbilled for client in self.tracker.clients):
                return
            for client in self.tracker.clients:
                await client.update_charges()
            await asyncio.to_thread(self._write, keys)

    def _write(self, keys: set[str]) -> None:
        try:
            if (charges := self.tracker.charges) != self.store.usage:
                self.store.usage = charges
        finally:
            self.store.flush(keys)

    async def update_charges(self) -> None:
        """Query the endpoint's charges if completions have arrived since the last query.

        A replica that does not respond within 5 seconds is queried again next time.
        """
        if not self.has_unbilled:
            return
        self.has_unbilled = False
        try:
            async with asyncio.timeout(_USAGE_SECONDS):
                usage = await self._endpoint_usage()
        except (TimeoutError, RaykError):
            self.has_unbilled = True
            return
        if usage:
            if usage["requests"] < self._last_usage.get("requests", 0):  # a new replica counts from 0
                self._charges_of_lost_replicas, self._usage_at_start = self._charges, {}
            self._last_usage = usage
            self._charges = add_usage(self._charges_of_lost_replicas, add_usage(usage, self._usage_at_start, -1))
            self.tracker.set_charges(self, self._charges)

    async def _endpoint_usage(self) -> dict[str, Any]:
        """Return what the endpoint has charged all clients since its replica started; empty for other engines."""
        if self.teacher.info.engine != "openai":
            return {}
        usage = await self.teacher.ausage()
        return {} if usage is None else {name: value for name, value in asdict(usage).items() if value is not None}


def check_chat_template(tokenizer: Any, teacher: str) -> None:
    """Check that a teacher's tokenizer has a chat template.

    Raises:
        InputError: it has none.
    """
    if not tokenizer.chat_template:
        raise InputError(
            f"teacher '{teacher}' has no chat template in its tokenizer; add one, or remove 'chat' (for a judge: set "
            "chat: false)."
        )


async def run_in_order(work: Iterable[Coroutine[Any, Any, T]], limit: int) -> AsyncGenerator[T, None]:
    """Run coroutines, at most `limit` at a time, and yield their results in order. Closing early cancels the others."""
    running: list[asyncio.Task[T]] = []
    try:
        for coroutine in work:
            running.append(asyncio.create_task(coroutine))
            if len(running) >= limit:
                yield await running.pop(0)
        while running:
            yield await running.pop(0)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _to_dict(parameters: SamplingParameters) -> dict[str, Any]:
    """Return the parameters of a request; the ends follow from the model that is queried."""
    return {name: value for name, value in asdict(parameters).items() if name != "end_token_ids"}


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
