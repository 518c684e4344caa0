"""The asker's side of a teacher: `Teacher`, used alike in scripts, notebooks and Train workers.

All traffic runs on one background event loop per process, so a training step never waits for Python's network code
and a notebook's own loop is left alone. What is in flight is bounded (credit), results come back in the order they were
asked for, and a request that loses its replica is asked again: requests are pure functions of their content, so
nothing is lost, doubled or reordered.
"""

import asyncio
import time
from collections import deque
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import ray
import torch
from ray import serve
from ray.serve.exceptions import RayServeException

from rayk.config import TeacherConfig
from rayk.config.support import Hidden, Requested, Support, TopK
from rayk.engines.base import EngineInfo, SamplingParameters, Usage
from rayk.engines.batching import gather
from rayk.engines.checks import check_can_verify
from rayk.engines.speculative import Draft, Verdict
from rayk.errors import InputError, RaykError, TeacherUnavailable, UnusableSignal
from rayk.models import Head, unpack_head
from rayk.serving import application as applications
from rayk.serving.client import ServedModel
from rayk.serving.cluster import start_ray
from rayk.serving.event_loop import run_in_background, stream_in_background, wait_for
from rayk.signals.batch import SignalBatch, concatenate, decode
from rayk.signals.sequence import TokenSequence
from rayk.teachers import deployment
from rayk.teachers.cache import SignalCache, check_cacheable
from rayk.teachers.deployment import GenerateRequest, ScoreRequest, VerifyRequest

_PROMPTS_A_CALL = 32
_CHECKED_POSITIONS = 8
T = TypeVar("T")


class HasSequences(Protocol):
    """What `score` takes besides plain sequences: a `rayk.data.Batch`."""

    @property
    def sequences(self) -> list[TokenSequence]: ...


class Scorer(Protocol):
    """Who can be asked for signals: a teacher, or several as one."""

    @property
    def vocab_size(self) -> int: ...

    async def ascore(
        self, batch: HasSequences | Sequence[TokenSequence], support: Support | None = None
    ) -> SignalBatch: ...


@dataclass(frozen=True)
class Completion:
    """What a teacher wrote after one prompt; `logprobs` (nats) are the model's own, at temperature 1, untruncated.

    A black-box endpoint (engine kind `openai`) tells no `token_ids`. Where it had no answer, `finish_reason` is 'error'
    and `reason` says why; `refused` where it will not answer this prompt.
    """

    text: str
    token_ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: str
    reason: str = ""
    refused: bool = False


class Teacher(ServedModel):
    """A served teacher that answers. Made by `serve_teacher` or `connect_teacher`.

    With a `cache` it is asked only for signals that are not kept there, and those it gives are; all but `requested`
    ones, whose ids are other ones at every step.

    Raises:
        InputError: there is a cache, but the engine does not know its weights.
    """

    section = "teachers"
    unavailable = TeacherUnavailable

    def __init__(self, name: str, info: EngineInfo, settings: TeacherConfig, cache: SignalCache | None = None):
        if cache is not None:
            check_cacheable(info)
        super().__init__(name, in_flight=settings.in_flight, deadline_seconds=settings.deadline_seconds)
        self.what = f"Teacher '{name}'"
        self.name = name
        self.cache = cache
        self.info = info
        self.settings = settings
        self._head: Future[Head] | None = None

    @property
    def vocab_size(self) -> int:
        return self.info.vocab_size

    def score(self, batch: HasSequences | Sequence[TokenSequence], support: Support | None = None) -> SignalBatch:
        """The teacher's signals at the counted positions, a row a sequence, in order.

        Raises:
            InputError: the teacher cannot answer such a request.
            TeacherUnavailable: no answer before the deadline.
            UnusableSignal: a row's signal holds numbers that cannot be learned from; the error names the rows.
        """
        return self._timed(run_in_background(self._score(sequences_of(batch), support or TopK())))

    async def ascore(
        self, batch: HasSequences | Sequence[TokenSequence], support: Support | None = None
    ) -> SignalBatch:
        """`score`, awaitable on any event loop."""
        return await asyncio.wrap_future(run_in_background(self._score(sequences_of(batch), support or TopK())))

    def stream(
        self, batches: Iterable[Any], support: Support | None = None, prefetch: int = 4
    ) -> Iterator[tuple[Any, SignalBatch]]:
        """Pairs (batch, signals) in order, while up to `prefetch` later batches are being answered."""
        asked: deque[Any] = deque()

        def requests() -> Iterator[Coroutine[Any, Any, SignalBatch]]:
            for batch in batches:
                asked.append(batch)
                yield self._score(sequences_of(batch), support or TopK())

        with closing(stream_in_background(requests(), prefetch)) as results:
            while True:
                began = time.perf_counter()
                try:
                    signals = next(results)
                except StopIteration:
                    return
                finally:
                    self.statistics.wait_seconds += time.perf_counter() - began
                yield asked.popleft(), signals

    def generate(
        self, prompts: Sequence[str] | Sequence[np.ndarray], *, max_new_tokens: int = 256, temperature: float = 1.0,
        top_p: float = 1.0, top_k: int = 0, stop: Sequence[str] = (), seed: int = 0,
    ) -> list[Completion]:  # fmt: skip
        """One completion a prompt (text, or token ids), in order. `temperature` 0 is greedy; equal seeds, equal text.

        Raises:
            InputError: a prompt that leaves no room for `max_new_tokens`.
            TeacherUnavailable: no answer before the deadline.
        """
        parameters = SamplingParameters(max_new_tokens, temperature, top_p, top_k, tuple(stop))
        return self._timed(run_in_background(self._generate(list(prompts), parameters, seed)))

    async def agenerate(
        self, prompts: Sequence[Any], parameters: SamplingParameters, seed: int | Sequence[int] = 0
    ) -> list[Completion]:
        """`generate`, awaitable on any event loop; `seed` may be one for each prompt."""
        return await asyncio.wrap_future(run_in_background(self._generate(list(prompts), parameters, seed)))

    async def averify(self, drafts: Sequence[Draft]) -> list[Verdict]:
        """Which drafted tokens are kept, a verdict a draft, in order (`rayk.engines.speculative`); on any event loop.

        Raises:
            InputError: the teacher cannot verify, or not these drafts.
            TeacherUnavailable: no answer before the deadline.
        """
        check_can_verify(self.info)
        return await asyncio.wrap_future(run_in_background(self._verify(list(drafts))))

    def usage(self) -> Usage | None:
        """What all askers together have used of a paid endpoint (engine kind `openai`) since its replica started; None
        with any other engine."""
        return wait_for(run_in_background(self._usage()))

    async def ausage(self) -> Usage | None:
        """`usage`, awaitable on any event loop."""
        return await asyncio.wrap_future(run_in_background(self._usage()))

    async def _usage(self) -> Usage | None:
        return await self._call_without_credit("usage", None, lambda usage: usage)

    def _timed(self, future: "Future[T]") -> T:
        began = time.perf_counter()
        try:
            return wait_for(future)
        finally:
            self.statistics.wait_seconds += time.perf_counter() - began

    async def _score(self, rows: list[TokenSequence], support: Support) -> SignalBatch:
        sequences = [row.view(self.settings.name) for row in rows]
        if self.cache is not None and not isinstance(support, Requested):
            signals = await self._score_cached(self.cache, sequences, support)
        else:
            signals = await self._ask(sequences, range(len(sequences)), support)
        if isinstance(support, Hidden):
            signals = replace(signals, head=await self.ahead())
            self._check_head(signals, np.concatenate([sequence.targets for sequence in sequences]))
        self.statistics.tokens += signals.tokens
        return signals

    async def _score_cached(self, cache: SignalCache, sequences: list[TokenSequence], support: Support) -> SignalBatch:
        """What the cache holds of `sequences`, after the replicas have been asked for the rest. Files and compression
        are left to threads, for the loop has other requests to look after."""
        rows = await asyncio.to_thread(cache.find, self.info, sequences, support)
        self.statistics.cached_tokens += sum(found.tokens for found in rows.values())
        missing = [row for row in range(len(sequences)) if row not in rows]
        if missing:
            asked = await self._ask(sequences, missing, support)
            kept = await asyncio.to_thread(cache.add, self.info, [sequences[row] for row in missing], asked)
            rows |= zip(missing, kept, strict=True)
        return concatenate([rows[row] for row in range(len(sequences))])

    async def _ask(self, batch: list[TokenSequence], chosen: Sequence[int], support: Support) -> SignalBatch:
        """The replicas' signals for the `chosen` rows of `batch`."""
        sequences = [batch[row] for row in chosen]
        order = sorted(range(len(sequences)), key=lambda row: len(sequences[row]))
        calls = _split([len(sequences[row]) for row in order], self.settings.call_tokens)
        rows_of = [[order[i] for i in call] for call in calls]
        parts = await gather(
            self._call("score", ScoreRequest.of([sequences[row] for row in rows], support), self._decoded)
            for rows in rows_of
        )
        position = {row: i for i, row in enumerate(row for rows in rows_of for row in rows)}
        signals = concatenate(parts).select([position[row] for row in range(len(sequences))])
        expected = np.asarray([sequence.counted_tokens for sequence in sequences])
        if not np.array_equal(signals.offsets.diff().numpy(), expected):
            raise RaykError(f"Teacher '{self.name}' answered for other positions than it was asked about.")
        if unusable := {chosen[row]: reason for row, reason in signals.invalid_rows().items()}:
            row, reason = next(iter(unusable.items()))
            place = getattr(batch[row], "where", "") or f"row {row} of the batch"
            raise UnusableSignal(
                f"Teacher '{self.name}' gave a signal for {place} that cannot be learned from: {reason}.", [*unusable]
            )
        return signals

    async def ahead(self) -> Head:
        """The teacher's head, fetched when first asked for; processes of a node share its memory."""
        if self._head is None:
            self._head = run_in_background(self._call("head", None, _head_of))
        return await asyncio.wrap_future(self._head)

    def _check_head(self, signals: SignalBatch, targets: np.ndarray) -> None:
        """Hold some positions of a reply against the actual tokens' log-probs, which the teacher made with its own
        head: a wrong head, scale or soft-cap is off by nats.

        Raises:
            RaykError: they do not agree.
        """
        assert signals.head is not None
        assert isinstance(signals.support, Hidden)
        some = torch.arange(0, signals.tokens, max(1, signals.tokens // _CHECKED_POSITIONS))[:_CHECKED_POSITIONS]
        if not len(some):
            return
        probe = replace(signals, hidden=signals.hidden[some])  # type: ignore[index]
        chosen = torch.from_numpy(targets[some.numpy()].astype(np.int64))[:, None]
        ours = probe.logits().log_softmax(1).gather(1, chosen)[:, 0]
        theirs = signals.target_logprobs[some]
        coarse = "bfloat16" in (signals.support.dtype, self.info.dtype)
        tolerance = (0.3 if coarse else 0.05) + 0.02 * theirs.abs()
        if bool(((ours - theirs).abs() > tolerance).any()):
            raise RaykError(
                f"The hidden states of teacher '{self.name}' and its head do not make its own log-probs (off by up to "
                f"{(ours - theirs).abs().max():.2g} nats); use support 'topk', and please report the architecture."
            )

    def _decoded(self, wire: np.ndarray) -> SignalBatch:
        self.statistics.bytes += wire.nbytes
        return decode(wire)

    async def _generate(
        self, prompts: list[Any], parameters: SamplingParameters, seed: int | Sequence[int]
    ) -> list[Completion]:
        if isinstance(seed, int):
            seed = [int(each) for each in np.random.SeedSequence(seed).generate_state(len(prompts), np.uint64)]
        seeds = list(seed)
        starts = range(0, len(prompts), _PROMPTS_A_CALL)
        parts = await gather(
            self._call(
                "generate",
                GenerateRequest(prompts[i : i + _PROMPTS_A_CALL], seeds[i : i + _PROMPTS_A_CALL], parameters),
                list,
            )
            for i in starts
        )
        return [
            Completion(one.text, one.token_ids, one.logprobs, one.finish_reason, one.reason, one.refused)
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


async def _head_of(references: list[ray.ObjectRef]) -> Head:
    return unpack_head(await references[0])


def sequences_of(batch: HasSequences | Sequence[TokenSequence]) -> list[TokenSequence]:
    """The sequences of a batch.

    Raises:
        InputError: there is none.
    """
    sequences = list(batch if isinstance(batch, Sequence) else batch.sequences)
    if not sequences:
        raise InputError("There is nothing to score: the batch holds no sequence.")
    return sequences


def _split(lengths: list[int], budget: int) -> list[list[int]]:
    """Consecutive positions in groups of at most `budget` tokens, at least one each."""
    groups: list[list[int]] = []
    total = 0
    for position, length in enumerate(lengths):
        if not groups or total + length > budget:
            groups.append([])
            total = 0
        groups[-1].append(position)
        total += length
    return groups


def connect_teacher(name: str, settings: TeacherConfig | None = None, cache: SignalCache | None = None) -> Teacher:
    """Attach to the teacher that runs as Serve application `name` (from `rayk serve` or another process).

    `settings`: credit and deadline of this asker; by default those the teacher was deployed with. `cache`: where its
    signals are kept; by default nowhere.

    Raises:
        InputError: no such teacher runs on this cluster.
    """
    start_ray()
    try:
        handle = serve.get_deployment_handle(applications.DEPLOYMENT, app_name=name)
        info, deployed = handle.describe.remote().result(timeout_s=60)
    except (KeyError, RayServeException, ray.exceptions.RayError, TimeoutError) as error:
        raise InputError(
            f"No teacher '{name}' answers on this Ray cluster; start it with `rayk serve`, or give its model instead "
            "of 'attach: true'."
        ) from error
    return Teacher(name, info, settings or TeacherConfig.model_validate(deployed), cache)


@contextmanager
def serve_teacher(config: TeacherConfig, cache: SignalCache | None = None) -> Iterator[Teacher]:
    """Bring a teacher up on Ray Serve (starting Ray if need be), and take it down at the end; `cache` as in
    `connect_teacher`.

    With `attach: true` the teacher must already run, and is left running.

    Raises:
        InputError: it cannot be started or reached, or another teacher runs under its name.
    """
    start_ray(num_cpus=config.resources.num_cpus * config.replicas.max + 1)
    if config.attach:
        yield connect_teacher(config.name, config, cache)
        return
    adopted = deployment.is_running(config)
    try:
        if not adopted:
            deployment.deploy(config)
        yield connect_teacher(config.name, config, cache)
    finally:
        applications.remove(config.name)
