"""The scribe: asks a teacher, and remembers.

A recipe is plain code that asks a scribe for completions. What the store holds is not asked again, so running a recipe
again means going on where it was stopped. For that a recipe must ask the same whenever the same was answered: its
chance comes from `CompletionClient.seed`, by the place of a row, never from the order in which answers come.
"""

import asyncio
import contextlib
import hashlib
import json
import time
from collections import Counter
from collections.abc import AsyncGenerator, Coroutine, Iterable
from dataclasses import asdict, dataclass
from typing import Any, NoReturn, TypeVar

import numpy as np

from rayk.config import SynthesisSettings
from rayk.data.tokens import Encoder
from rayk.engines.base import SamplingParameters
from rayk.engines.batching import gather
from rayk.errors import InputError, RaykError, RunFailed, TeacherUnavailable
from rayk.models import load_tokenizer
from rayk.synthesis.store import CompletionStore, StoredCompletion
from rayk.synthesis.usage import UsageTracker, add_usage
from rayk.teachers import Teacher
from rayk.teachers.client import Completion
from rayk.text.words import whole_characters

_FLUSH_COMPLETIONS = 256
_TICK_SECONDS = 2.0
_USAGE_SECONDS = 5.0
_UNANSWERED_IN_A_ROW = 32
_REFUSED_AT_FIRST = 256
T = TypeVar("T")


@dataclass(frozen=True)
class CompletionRequest:
    """One completion to be written.

    Attributes:
        prompt: what is asked.
        sent: what the teacher reads for it, to the letter, where the recipe has laid that out itself: neither a chat
            template nor the tokenizer's own beginning is put around it. The store finds the request by `prompt` all the
            same, for a template may write the day's date.
    """

    prompt: str
    seed: int
    parameters: SamplingParameters
    sent: str | None = None


class CompletionClient:
    """Asks a model, most often the teacher, what `store` does not hold, up to `settings.in_flight` prompts at once. An
    async context manager: at its end, or when it is cancelled, all that was written is on disk.

    Args:
        tally: shared by the scribes of a store; one of its own by default.
        role: what the model is where it is not the teacher that writes; among equal requests and in the provenance it
            tells them apart.
        chat: instead of `settings.chat`.

    Attributes:
        teacher: who is asked.

    Raises:
        InputError: it is to chat, but the model's tokenizer has no chat template, or it is an endpoint.
    """

    def __init__(
        self, teacher: Teacher, store: CompletionStore, settings: SynthesisSettings, seed: int = 0, tally: UsageTracker | None = None, *,
        role: str = "", chat: bool | None = None,
    ):  # fmt: skip
        self.store, self.tally = store, tally or UsageTracker(store.usage)
        self._settings, self._seed, self._role = settings, seed, role
        self._chat = settings.chat if chat is None else chat
        in_flight = teacher.settings.model_copy(update={"in_flight": settings.in_flight})
        self.teacher = Teacher(teacher.name, teacher.info, in_flight)
        self._encoder = None
        if self._chat and teacher.info.engine == "openai":
            raise InputError(
                f"synthesis.chat: teacher '{teacher.name}' is an endpoint with a chat template of its own; leave it "
                "out."
            )
        if teacher.info.engine != "openai":
            remote = teacher.settings.trust_remote_code
            self._encoder = Encoder(load_tokenizer(teacher.info.model, trust_remote_code=remote))
            if self._chat:
                check_chat_template(self._encoder.tokenizer, teacher.name)
        self._slots = asyncio.Semaphore(settings.in_flight)
        self._ended = asyncio.Event()
        self._ordinals: Counter[str] = Counter()
        self._in_a_row = 0
        self._answered = False
        self._refusals: list[tuple[StoredCompletion, dict[str, Any]]] = []  # before anything was answered
        self._uncounted = False  # whether something came since the endpoint told what it charges
        self._failure: RaykError | None = None
        self._charged_before: dict[str, Any] = {}
        self._charged: dict[str, Any] = {}
        self._usage_at_start: dict[str, Any] = {}
        self._seen: dict[str, Any] = {}

    async def __aenter__(self) -> "CompletionClient":
        self._usage_at_start = self._seen = await self._usage()
        self.tally.scribes.append(self)
        self._ticking = asyncio.create_task(self._tick())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._ended.set()
        try:
            await self._ticking
        finally:
            try:
                await self._flush()
            finally:
                self.tally.scribes.remove(self)

    @property
    def total(self) -> int:
        """How many completions the recipe will ask for, of this scribe and those beside it; the recipe says so."""
        return self.tally.total

    @total.setter
    def total(self, total: int) -> None:
        self.tally.total = total

    @property
    def done(self) -> int:
        """How many of them it has."""
        return self.tally.done

    @property
    def chats(self) -> bool:
        """Whether the teacher reads its prompts as a user's messages."""
        return self._chat or self.teacher.info.applies_chat_template

    def seed(self, *place: int) -> int:
        """A seed for a place (stage, row, sample, …), from the run's; equal for equal places."""
        return int(np.random.SeedSequence([self._seed, *place]).generate_state(1, np.uint64)[0])

    async def write(self, requests: Iterable[CompletionRequest]) -> list[StoredCompletion]:
        """A completion for each request, in order; see `ask`."""
        return await gather(self.ask(request) for request in requests)

    async def ask(self, request: CompletionRequest) -> StoredCompletion:
        """The completion of a request, from the store or the teacher. One that could not be had has `finish_reason`
        'error'. Where it is `refused` that is kept like a completion, else another run asks again.

        Raises:
            RunFailed: the teacher leaves everything unanswered, or the disk is full.
            TeacherUnavailable, InputError: as `Teacher.generate`.
        """
        key = self._key(request)
        written = self.store.find(key)
        if written is None:
            async with self._slots:
                if self._failure is not None:
                    raise self._failure
                written = await self._asked(key, request)
        else:
            self._answered = True
        if self._answered:
            self._keep_refusals()
        self.tally.done += 1
        self.tally.tell()
        return written

    def _key(self, request: CompletionRequest) -> str:
        """What tells requests apart; an equal one that comes again is another one."""
        info = self.teacher.info
        asked = [
            request.prompt, asdict(request.parameters), request.seed, info.engine,
            info.weights_fingerprint or info.model, self._chat if request.sent is None else "sent",
            *filter(None, [self._role]),
        ]  # fmt: skip
        same = hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=16).hexdigest()
        self._ordinals[same] += 1
        return f"{same}-{self._ordinals[same]}"

    async def _asked(self, key: str, request: CompletionRequest) -> StoredCompletion:
        text, prompt = self._sent(request)
        if reason := self._too_long(prompt, request.parameters):
            return StoredCompletion(key, "", None, None, "error", reason, refused=True)
        try:
            completion = (await self.teacher.agenerate([prompt], request.parameters, [request.seed]))[0]
        except TeacherUnavailable as error:
            if self.teacher.info.engine != "openai":
                raise
            return self._left_unanswered(key, str(error))
        self.tally.asked += 1
        self._uncounted = True
        if completion.finish_reason == "error" and not completion.refused:
            return self._left_unanswered(key, completion.reason)
        written = _written(key, completion)
        provenance = {
            "prompt": text, "parameters": json.dumps(asdict(request.parameters)), "seed": request.seed,
            "teacher": self._role or self.teacher.name, "model": self.teacher.info.model,
            "weights": self.teacher.info.weights_fingerprint, "written_at_seconds": time.time(),
        }  # fmt: skip
        if completion.refused:
            self._take_refusal(written, provenance)
        else:
            self._in_a_row, self._answered = 0, True
            self.tally.tokens += written.tokens or 0
            self.store.add(written, provenance)
        if self.store.unwritten >= _FLUSH_COMPLETIONS:
            await self._flush()
        return written

    def _sent(self, request: CompletionRequest) -> tuple[str, str | np.ndarray]:
        """What the teacher reads: as text, and as it is sent."""
        prompt = request.prompt if request.sent is None else request.sent
        if self._encoder is None:
            return prompt, prompt
        if request.sent is not None:
            return prompt, np.asarray(self._encoder.encode([prompt])[0], np.int32)
        if not self._chat:
            return prompt, np.asarray(self._encoder.prompts([prompt])[0], np.int32)
        ids = self._encoder.chat_prompt([{"role": "user", "content": prompt}], "synthesis.chat")
        return self._encoder.tokenizer.decode(ids), np.asarray(ids, np.int32)

    def _too_long(self, prompt: str | np.ndarray, parameters: SamplingParameters) -> str:
        limit = self.teacher.info.max_tokens
        if isinstance(prompt, str) or len(prompt) + parameters.max_new_tokens <= limit:
            return ""
        return (
            f"the prompt of {len(prompt)} tokens leaves no room for {parameters.max_new_tokens} more: the teacher "
            f"takes {limit}"
        )

    def _left_unanswered(self, key: str, reason: str) -> StoredCompletion:
        """One prompt without an answer costs the others nothing; many in a row mean that nobody is there."""
        self.tally.unanswered += 1
        self._in_a_row += 1
        if self._in_a_row >= _UNANSWERED_IN_A_ROW:
            self._fail(f"left {self._in_a_row} prompts in a row unanswered, the last since {reason}")
        return StoredCompletion(key, "", None, None, "error", reason)

    def _take_refusal(self, written: StoredCompletion, provenance: dict[str, Any]) -> None:
        """A refusal is an answer of a sort, and kept; but where not one prompt was ever taken, it is not the prompts'
        fault, and they are asked again when that is mended."""
        self.tally.refused += 1
        self._in_a_row = 0
        self._refusals.append((written, provenance))
        if not self._answered and len(self._refusals) >= _REFUSED_AT_FIRST:
            self._fail(f"refused the first {len(self._refusals)} prompts, the last since {written.reason}")

    def _keep_refusals(self) -> None:
        for refusal in self._refusals:
            self.store.add(*refusal)
        self._refusals.clear()

    def _fail(self, what: str) -> NoReturn:
        self._failure = RunFailed(
            f"Teacher '{self.teacher.name}' {what}. What was written before is kept; see to the teacher and run again."
        )
        raise self._failure

    async def _tick(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), _TICK_SECONDS)
            try:
                await self._flush()
            except RaykError as error:
                self._failure = error
                return

    async def _flush(self) -> None:
        """Write what has come, and before it what was charged for it: a kill in between leaves no completion that is
        not in the bill."""
        async with self.tally.flushing:
            keys = self.store.unwritten_keys
            if not keys and not any(scribe._uncounted for scribe in self.tally.scribes):
                return
            for scribe in self.tally.scribes:
                await scribe._see_charges()
            await asyncio.to_thread(self._write_down, keys)

    def _write_down(self, keys: set[str]) -> None:
        try:
            if (charged := self.tally.charged) != self.store.usage:
                self.store.usage = charged
        finally:
            self.store.flush(keys)

    async def _see_charges(self) -> None:
        """Ask what was charged since the last time. A replica that does not answer holds nothing up: the next time
        will do."""
        if not self._uncounted:
            return
        self._uncounted = False
        try:
            async with asyncio.timeout(_USAGE_SECONDS):
                used = await self._usage()
        except (TimeoutError, RaykError):
            self._uncounted = True
            return
        if used:
            if used["requests"] < self._seen.get("requests", 0):  # its replica was replaced, and counts anew
                self._charged_before, self._usage_at_start = self._charged, {}
            self._seen = used
            self._charged = add_usage(self._charged_before, add_usage(used, self._usage_at_start, -1))
            self.tally.charge(self, self._charged)

    async def _usage(self) -> dict[str, Any]:
        """What the teacher's endpoint has charged to all since its replica started; empty where it is none."""
        if self.teacher.info.engine != "openai":
            return {}
        usage = await self.teacher.ausage()
        return {} if usage is None else {name: value for name, value in asdict(usage).items() if value is not None}


def check_chat_template(tokenizer: Any, teacher: str) -> None:
    """Refuse to ask in a chat template where there is none.

    Raises:
        InputError: the teacher's tokenizer has none.
    """
    if not tokenizer.chat_template:
        raise InputError(
            f"teacher '{teacher}' has no chat template in its tokenizer; give it one, or leave 'chat' out (of a judge: "
            "set chat: false)."
        )


async def run_in_order(work: Iterable[Coroutine[Any, Any, T]], at_once: int) -> AsyncGenerator[T, None]:
    """Results of `work` in order, up to `at_once` pieces under way; leaving early cancels them."""
    under_way: list[asyncio.Task[T]] = []
    try:
        for piece in work:
            under_way.append(asyncio.create_task(piece))
            if len(under_way) >= at_once:
                yield await under_way.pop(0)
        while under_way:
            yield await under_way.pop(0)
    finally:
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)


def _written(key: str, completion: Completion) -> StoredCompletion:
    known = len(completion.logprobs) > 0
    return StoredCompletion(
        key, whole_characters(completion.text), len(completion.token_ids) or None,
        # As the store keeps it, so that an answer reads the same whether it has just come or was found.
        float(np.float32(np.mean(completion.logprobs, dtype=np.float64))) if known else None, completion.finish_reason,
        whole_characters(completion.reason), completion.refused,
    )  # fmt: skip
