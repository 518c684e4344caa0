"""The client of a teacher: `Teacher`, for scripts, notebooks and training workers.

All requests run on one background event loop per process, so a training step never waits for Python's network code and
the caller's own event loop is not touched. The number of open calls is limited by credit, results are returned in the
order of the requests, and a request whose replica dies is repeated. The answer depends on the content of the request
only, so no result is lost, duplicated or reordered.
"""

import asyncio
import time
from collections import deque
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import ray
import torch

from rayk.config import TeacherConfig
from rayk.config.support import Requested, Support, TopK
from rayk.engines.base import EngineInfo, SamplingParameters, Usage
from rayk.engines.batching import gather
from rayk.engines.checks import check_can_verify
from rayk.engines.speculative import Draft, Verdict
from rayk.errors import InputError, RaykError, TeacherUnavailable, UnusableSignal
from rayk.models import Head, unpack_head
from rayk.serving.busy_time import BusyTime
from rayk.serving.client import ServedModel
from rayk.serving.event_loop import run_in_background, stream_in_background, wait_for
from rayk.serving.requests import GenerateRequest, ScoreRequest
from rayk.signals.batch import SignalBatch, concatenate
from rayk.signals.sequence import TokenSequence
from rayk.signals.wire import decode
from rayk.teachers.cache import SignalCache, check_cacheable
from rayk.teachers.deployment import VerifyRequest
from rayk.teachers.token_ids import TokenIdCheck

_PROMPTS_PER_CALL = 32
_CHECKED_POSITIONS = 8
T = TypeVar("T")


class HasSequences(Protocol):
    """Input of `score` besides plain sequences: a `rayk.data.Batch`."""

    @property
    def sequences(self) -> list[TokenSequence]: ...


class Scorer(Protocol):
    """Source of signals: one teacher, or several combined."""

    @property
    def vocab_size(self) -> int: ...

    async def ascore(
        self, batch: HasSequences | Sequence[TokenSequence], support: Support | None = None
    ) -> SignalBatch: ...


@dataclass(frozen=True)
class Completion:
    """A teacher's completion of one prompt; `logprobs` (nats) are the model's, at temperature 1 and not truncated.

    A black-box endpoint (engine kind `openai`) returns no `token_ids`. If it returned no text, `finish_reason` is
    'error' and `reason` contains its message; `refused` if it rejected this prompt for its content. `thought` is the
    thought of a reasoning model if the endpoint returned it apart from the text.
    """

    text: str
    token_ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: str
    reason: str = ""
    refused: bool = False
    thought: str = ""


class Teacher(ServedModel):
    """Client of a running teacher, created by `serve_teacher` or `connect_teacher`.

    With a `cache`, only signals that are not in the cache are requested, and received signals are stored. `requested`
    signals are never cached: their ids change every step.

    A row with a context for this teacher (`rayk.data.Example.view`) is scored after that context.

    Raises:
        InputError: a cache is given, but the engine reports no fingerprint of its weights.
    """

    section = "teachers"
    unavailable = TeacherUnavailable

    def __init__(
        self, name: str, info: EngineInfo, settings: TeacherConfig, cache: SignalCache | None = None,
        load_seconds: float = 0.0,
    ):  # fmt: skip
        if cache is not None:
            check_cacheable(info)
        super().__init__(
            name, in_flight=settings.in_flight, deadline_seconds=settings.deadline_seconds, load_seconds=load_seconds
        )
        self.label = f"Teacher '{name}'"
        self.name = name
        self.cache = cache
        self.info = info
        self.settings = settings
        self.scoring = BusyTime()
        """The time in which requests for signals were open; signals from the cache take none."""
        self._head: Future[Head] | None = None
        self._token_ids = TokenIdCheck(name, info, settings.trust_remote_code)

    @property
    def vocab_size(self) -> int:
        return self.info.vocab_size

    def score(self, batch: HasSequences | Sequence[TokenSequence], support: Support | None = None) -> SignalBatch:
        """Return the teacher's signals at the counted tokens, one row per sequence, in order.

        Raises:
            InputError: the teacher cannot answer this request, or the batch's tokenizer gives tokens other ids.
            TeacherUnavailable: no answer before the deadline.
            UnusableSignal: a row's signal contains NaN or infinite values; the error names the rows.
        """
        return self._timed(run_in_background(self._score(self._sequences_of(batch), support or TopK())))

    async def ascore(
        self, batch: HasSequences | Sequence[TokenSequence], support: Support | None = None
    ) -> SignalBatch:
        """Like `score`, awaitable on any event loop."""
        return await asyncio.wrap_future(run_in_background(self._score(self._sequences_of(batch), support or TopK())))

    def stream(
        self, batches: Iterable[Any], support: Support | None = None, prefetch: int = 4
    ) -> Iterator[tuple[Any, SignalBatch]]:
        """Yield pairs (batch, signals) in order, while the signals of up to `prefetch` later batches are requested."""
        pending: deque[Any] = deque()

        def requests() -> Iterator[Coroutine[Any, Any, SignalBatch]]:
            for batch in batches:
                pending.append(batch)
                yield self._score(self._sequences_of(batch), support or TopK())

        with closing(stream_in_background(requests(), prefetch)) as results:
            while True:
                began = time.perf_counter()
                try:
                    signals = next(results)
                except StopIteration:
                    return
                finally:
                    self.statistics.add(wait_seconds=time.perf_counter() - began)
                yield pending.popleft(), signals

    def generate(
        self, prompts: Sequence[str] | Sequence[np.ndarray], *, max_new_tokens: int = 256, temperature: float = 1.0,
        top_p: float = 1.0, top_k: int = 0, stop: Sequence[str] = (), seed: int = 0,
    ) -> list[Completion]:  # fmt: skip
        """Return one completion per prompt (text, or token ids), in order.

        `temperature` 0 is greedy. The same seed gives the same completions.

        Raises:
            InputError: a prompt leaves no room for `max_new_tokens`.
            TeacherUnavailable: no answer before the deadline.
        """
        parameters = SamplingParameters(max_new_tokens, temperature, top_p, top_k, tuple(stop))
        return self._timed(run_in_background(self._generate(list(prompts), parameters, seed)))

    async def agenerate(
        self, prompts: Sequence[Any], parameters: SamplingParameters, seed: int | Sequence[int] = 0
    ) -> list[Completion]:
        """Like `generate`, awaitable on any event loop; `seed` may contain one seed per prompt."""
        return await asyncio.wrap_future(run_in_background(self._generate(list(prompts), parameters, seed)))

    async def averify(self, drafts: Sequence[Draft]) -> list[Verdict]:
        """Return one verdict per draft, in order: which tokens the teacher accepts (`rayk.engines.speculative`).

        Awaitable on any event loop.

        Raises:
            InputError: the teacher cannot verify drafts, or one is too long or has ids out of range.
            TeacherUnavailable: no answer before the deadline.
        """
        check_can_verify(self.info)
        return await asyncio.wrap_future(run_in_background(self._verify(list(drafts))))

    def usage(self) -> Usage | None:
        """Return the usage of a paid endpoint (engine kind `openai`) by all requesters since its replica started; None
        for all other engines."""
        return wait_for(run_in_background(self._usage()))

    async def ausage(self) -> Usage | None:
        """Like `usage`, awaitable on any event loop."""
        return await asyncio.wrap_future(run_in_background(self._usage()))

    async def _usage(self) -> Usage | None:
        return await self._call_without_credit("usage", None, lambda usage: usage)

    def _timed(self, future: "Future[T]") -> T:
        began = time.perf_counter()
        try:
            return wait_for(future)
        finally:
            self.statistics.add(wait_seconds=time.perf_counter() - began)

    def _sequences_of(self, batch: HasSequences | Sequence[TokenSequence]) -> list[TokenSequence]:
        self._token_ids.check(batch)
        return sequences_of(batch)

    async def _score(self, sequences: list[TokenSequence], support: Support) -> SignalBatch:
        sequences = [sequence.view(self.settings.name) for sequence in sequences]
        if self.cache is not None and not isinstance(support, Requested):
            signals = await self._score_with_cache(self.cache, sequences, support)
        else:
            signals = await self._request_signals(sequences, range(len(sequences)), support)
        if signals.hidden is not None:
            signals = replace(signals, head=await self._get_head())
            self._check_head(signals, np.concatenate([sequence.targets for sequence in sequences]))
        self.statistics.add(tokens=signals.tokens)
        return signals

    async def _score_with_cache(
        self, cache: SignalCache, sequences: list[TokenSequence], support: Support
    ) -> SignalBatch:
        """Return the signals of `sequences` from the cache; request and store those that it does not contain.

        File access and compression run in threads, so that they do not block other requests on the event loop.
        """
        rows = await asyncio.to_thread(cache.find, self.info, sequences, support)
        self.statistics.add(cached_tokens=sum(signals.tokens for signals in rows.values()))
        missing = [row for row in range(len(sequences)) if row not in rows]
        if missing:
            received = await self._request_signals(sequences, missing, support)
            stored = await asyncio.to_thread(cache.add, self.info, [sequences[row] for row in missing], received)
            rows |= zip(missing, stored, strict=True)
        return concatenate([rows[row] for row in range(len(sequences))])

    async def _request_signals(
        self, batch: list[TokenSequence], chosen: Sequence[int], support: Support
    ) -> SignalBatch:
        """Request the signals of the rows `chosen` of `batch` from the replicas."""
        sequences = [batch[row] for row in chosen]
        order = sorted(range(len(sequences)), key=lambda row: len(sequences[row]))
        calls = _split([len(sequences[row]) for row in order], self.settings.call_tokens)
        rows_of_calls = [[order[i] for i in call] for call in calls]
        with self.scoring:
            parts = await gather(
                self._call(
                    "score", ScoreRequest.from_sequences([sequences[row] for row in rows], support), self._decode
                )
                for rows in rows_of_calls
            )
        position = {row: i for i, row in enumerate(row for rows in rows_of_calls for row in rows)}
        signals = concatenate(parts).select([position[row] for row in range(len(sequences))])
        expected = np.asarray([sequence.counted_tokens for sequence in sequences])
        if not np.array_equal(signals.offsets.diff().numpy(), expected):
            raise RaykError(f"Teacher '{self.name}' returned signals for other positions than requested.")
        if unusable := {chosen[row]: reason for row, reason in signals.invalid_rows().items()}:
            row, reason = next(iter(unusable.items()))
            place = getattr(batch[row], "where", "") or f"row {row} of the batch"
            raise UnusableSignal(
                f"Teacher '{self.name}' returned an unusable signal for {place}: {reason}.", [*unusable]
            )
        return signals

    async def _get_head(self) -> Head:
        """Return the teacher's head, requested once per process; processes of a node share its memory."""
        if self._head is None:
            self._head = run_in_background(self._call("head", None, read_head))
        return await asyncio.wrap_future(self._head)

    def _check_head(self, signals: SignalBatch, targets: np.ndarray) -> None:
        """Check the head: compare the log-probs of some target tokens computed with it with those from the teacher.

        With a wrong head, scale or soft-cap they differ by whole nats.

        Raises:
            RaykError: the log-probs differ.
        """
        assert signals.head is not None and signals.hidden is not None
        some = torch.arange(0, signals.tokens, max(1, signals.tokens // _CHECKED_POSITIONS))[:_CHECKED_POSITIONS]
        if not len(some):
            return
        probe = replace(signals, hidden=signals.hidden[some])
        target_ids = torch.from_numpy(targets[some.numpy()].astype(np.int64))[:, None]
        computed = probe.logits().log_softmax(1).gather(1, target_ids)[:, 0]
        returned = signals.target_logprobs[some]
        coarse = signals.hidden.dtype == torch.bfloat16 or self.info.dtype == "bfloat16"
        tolerance = (0.3 if coarse else 0.05) + 0.02 * returned.abs()
        if bool(((computed - returned).abs() > tolerance).any()):
            raise RaykError(
                f"The hidden states of teacher '{self.name}' and its head do not reproduce its own log-probs (they "
                f"differ by up to {(computed - returned).abs().max():.2g} nats); use support 'topk', and please report "
                "the architecture."
            )

    def _decode(self, wire: np.ndarray) -> SignalBatch:
        self.statistics.add(bytes=wire.nbytes)
        return decode(wire)

    async def _generate(
        self, prompts: list[Any], parameters: SamplingParameters, seed: int | Sequence[int]
    ) -> list[Completion]:
        if isinstance(seed, int):
            seed = [int(state) for state in np.random.SeedSequence(seed).generate_state(len(prompts), np.uint64)]
        seeds = list(seed)
        calls = [slice(start, start + _PROMPTS_PER_CALL) for start in range(0, len(prompts), _PROMPTS_PER_CALL)]
        parts = await gather(
            self._call("generate", GenerateRequest(prompts[call], seeds[call], parameters), list) for call in calls
        )
        return [
            Completion(one.text, one.token_ids, one.logprobs, one.finish_reason, one.reason, one.refused, one.thought)
            for part in parts for one in part
        ]  # fmt: skip

    async def _verify(self, drafts: list[Draft]) -> list[Verdict]:
        order = sorted(range(len(drafts)), key=lambda row: len(drafts[row]))
        calls = _split([len(drafts[row]) for row in order], self.settings.call_tokens)
        parts = await gather(
            self._call("verify", VerifyRequest([drafts[order[i]] for i in call]), list) for call in calls
        )
        verdicts = dict(zip(order, (verdict for part in parts for verdict in part), strict=True))
        return [verdicts[row] for row in range(len(drafts))]


async def read_head(references: list[ray.ObjectRef]) -> Head:
    """Return the head that a replica's `head` refers to."""
    return unpack_head(await references[0])


def sequences_of(batch: HasSequences | Sequence[TokenSequence]) -> list[TokenSequence]:
    """Return the sequences of a batch.

    Raises:
        InputError: the batch is empty.
    """
    sequences = list(batch if isinstance(batch, Sequence) else batch.sequences)
    if not sequences:
        raise InputError("There is nothing to score: the batch contains no sequence.")
    return sequences


def _split(lengths: list[int], budget: int) -> list[list[int]]:
    """Split the positions 0, 1, … into consecutive groups of at most `budget` tokens, but at least one position."""
    groups: list[list[int]] = []
    total = 0
    for position, length in enumerate(lengths):
        if not groups or total + length > budget:
            groups.append([])
            total = 0
        groups[-1].append(position)
        total += length
    return groups
