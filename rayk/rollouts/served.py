"""A policy that writes on Ray Serve, so that generation scales apart from training.

A request names the version of the weights it is to be answered under and is otherwise a pure function of its content
(prompts, parameters, seeds), so it may be asked again after a replica's death, of any replica, without harm. How the
weights come there: `rayk.rollouts.weights`.
"""

import asyncio
import math
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Ordered
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import numpy as np
import ray
import torch
from ray import serve
from ray.exceptions import RayActorError, RayTaskError

from rayk.config import RunConfig, ServedRollouts
from rayk.data.batches import micro_batches
from rayk.data.examples import Example
from rayk.engines.base import Generated, SamplingParameters
from rayk.engines.batching import MicroBatcher, gather
from rayk.errors import InputError, PolicyUnavailable
from rayk.models import CausalLM, load_tokenizer, pick_device
from rayk.rollouts.policy import Rollout, lengths_of, parameters_of, rollouts_of
from rayk.rollouts.teacher_mixed import Verify
from rayk.rollouts.weights import (
    Published,
    UnusableWeights,
    Version,
    checksum,
    pack,
    start_store,
    store_named,
    take_over,
)
from rayk.rollouts.writer import Writer
from rayk.sequences import Sequence
from rayk.speculative import MixedSampling
from rayk.students import make_model
from rayk.support import Logprob, TopK
from rayk.teachers import deployment
from rayk.teachers.autoscaling import METRIC, Asker, Demand
from rayk.teachers.background import background
from rayk.teachers.calls import ServedModel
from rayk.teachers.deployment import GenerateRequest, ScoreRequest

_ROWS_A_CALL = 64


@dataclass(frozen=True)
class PolicyAddress:
    """Where a run's policy is: its Serve application, and the actor that knows its weights."""

    application: str
    store: str


@dataclass(frozen=True)
class Versioned:
    """A request, and the weights it is to be answered under."""

    version: Version
    request: GenerateRequest | ScoreRequest

    @property
    def tokens(self) -> int:
        return self.request.tokens


class PolicyReplica:
    """One copy of the policy. It begins without weights of its own and takes over those of each request's version; a
    batch is computed under one version."""

    async def __init__(self, settings: dict):  # type: ignore[misc]  # Serve awaits it
        config = RunConfig.model_validate(settings["run"])
        assert isinstance(config.rollouts, ServedRollouts)
        engine, device = config.rollouts.engine, pick_device(config.rollouts.engine.device)
        if device == "cpu":
            torch.set_num_threads(engine.threads or max(1, int(config.rollouts.resources.num_cpus)))
        tokenizer = load_tokenizer(settings["tokenizer"], trust_remote_code=config.student.trust_remote_code)
        model = make_model(config.student, tokenizer, config.seed, device)
        self._writer = Writer(model.eval(), tokenizer, config.training.precision)
        self._store = store_named(settings["store"])
        self._version: Version | None = None
        self._batcher = MicroBatcher(self._run, engine.batch_tokens)
        self._demand = Demand()
        self._fatal: Exception | None = None

    async def generate(self, asked: Versioned, asker: Asker | None = None) -> list[Generated]:
        """A continuation for each prompt."""
        request = asked.request
        assert isinstance(request, GenerateRequest)
        lengths = [len(prompt) + request.parameters.max_new_tokens for prompt in request.prompts]
        items = list(zip(request.prompts, request.seeds, strict=True))
        return await self._answer(asked, asker, request.parameters, items, lengths)

    async def read(self, asked: Versioned, asker: Asker | None = None) -> list[np.ndarray]:
        """At each sequence's counted positions the likeliest ids (support `topk`), or the log-prob of the token there
        (`logprob`); see `rayk.rollouts.Policy`."""
        request = asked.request
        assert isinstance(request, ScoreRequest)
        sequences = request.sequences()
        return await self._answer(asked, asker, request.support, sequences, [len(each) for each in sequences])

    async def check_health(self) -> None:
        if self._fatal is not None:
            raise RuntimeError(f"The device failed: {self._fatal}")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve passes to `rayk.teachers.autoscaling.WaitingTokensPolicy`."""
        return {METRIC: float(self._demand.waiting_tokens())}

    async def _answer(
        self, asked: Versioned, asker: Asker | None, how: Any, items: list[Any], lengths: list[int]
    ) -> list[Any]:
        with self._demand.answering(asker, asked.tokens):
            # Waited for here, not where batches are computed: others may still need an older version.
            published = await self._find(asked.version)
            return await self._batcher.submit((asked.version, published, how), items, lengths)

    async def _find(self, version: Version) -> Published:
        try:
            return await self._store.find.remote(version)
        except RayTaskError as error:
            raise error.cause from None
        except RayActorError:
            raise UnusableWeights("The actor that knows where the student's weights are has died.") from None

    def _run(self, key: Any, items: list[Any]) -> list[Any]:
        version, published, how = key
        try:
            if version != self._version:
                self._version = None
                take_over(self._writer.model, ray.get(published.weights), published.checksum, version)
                self._version = version
            with self._writer.computing():
                if isinstance(how, SamplingParameters):
                    prompts, seeds = zip(*items, strict=True)
                    return self._writer.generate(prompts, how, seeds)
                return self._writer.top_ids(items, how.k) if isinstance(how, TopK) else self._writer.logprobs(items)
        except torch.AcceleratorError as error:
            self._fatal = error  # a CUDA context does not recover: the health check has the replica replaced
            raise


class ServedPolicy(ServedModel):
    """One worker's side of the served policy; see `rayk.rollouts.Policy`. The worker that `publishes` has the replicas
    write with its own learner's weights."""

    what = "The served policy"
    section = "rollouts"
    unavailable = PolicyUnavailable

    def __init__(self, learner: CausalLM, settings: ServedRollouts, address: PolicyAddress, *, publishes: bool):
        super().__init__(address.application, in_flight=settings.in_flight, deadline_seconds=settings.deadline_seconds)
        self.parameters = parameters_of(settings)
        self._learner, self._publishes = learner, publishes
        self._tokens_at_a_time = settings.engine.batch_tokens * settings.replicas.max
        self._store = store_named(address.store)
        self._version = Version("", 0)

    def groups(self, prompts: Ordered[Sequence]) -> list[list[int]]:
        """See `Policy`; what all replicas write at a time."""
        return micro_batches(lengths_of(prompts, self.parameters), self._tokens_at_a_time)

    async def generate(
        self, prompts: Ordered[Example], parameters: SamplingParameters, seeds: Ordered[int]
    ) -> list[Rollout]:
        """See `Policy`."""
        version = self._version

        def request(rows: range) -> Versioned:
            ids = [prompts[row].prompt_ids for row in rows]
            return Versioned(version, GenerateRequest(ids, [seeds[row] for row in rows], parameters))

        written = await asyncio.wrap_future(background(self._in_calls("generate", len(prompts), request)))
        return rollouts_of(prompts, written, version.number)

    async def generate_mixed(
        self, prompts: Ordered[Example], verify: Verify, sampling: MixedSampling, seeds: Ordered[int]
    ) -> list[Rollout]:
        """Not to be had of replicas; `RunConfig` refuses settings that need it."""
        raise InputError("A served policy does not write together with a teacher; use rollouts.kind 'worker'.")

    async def top_ids(self, sequences: Ordered[Sequence], k: int) -> list[np.ndarray]:
        """See `Policy`."""
        return await self._read(sequences, TopK(k))

    async def logprobs(self, sequences: Ordered[Sequence]) -> list[np.ndarray]:
        """See `Policy`."""
        return await self._read(sequences, Logprob())

    def begin(self, attempt: str) -> None:
        """See `Policy`."""
        self._version = Version(attempt, 0)
        if self._publishes:
            self._tell_store("begin", attempt)

    def update(self, version: int) -> None:
        """See `Policy`; only where it `publishes` are the weights looked at."""
        self._version = Version(self._version.attempt, version)
        if self._publishes:
            weights = pack(self._learner)
            published = Published(checksum(weights), ray.put(weights))
            self._tell_store("publish", self._version, published)

    def _tell_store(self, method: str, *arguments: Any) -> None:
        try:
            ray.get(getattr(self._store, method).remote(*arguments))
        except RayTaskError as error:
            raise error.cause from error
        except RayActorError as error:
            raise UnusableWeights("The actor that knows where the student's weights are has died.") from error

    async def _read(self, sequences: Ordered[Sequence], support: TopK | Logprob) -> list[np.ndarray]:
        version = self._version

        def request(rows: range) -> Versioned:
            return Versioned(version, ScoreRequest.of([sequences[row] for row in rows], support))

        return await asyncio.wrap_future(background(self._in_calls("read", len(sequences), request)))

    async def _in_calls(self, method: str, rows: int, request: Callable[[range], Versioned]) -> list[Any]:
        """The answers for so many rows, in order, shared out among the replicas that run."""
        each = min(_ROWS_A_CALL, max(1, math.ceil(rows / await self._credit.replicas())))
        calls = (range(start, min(start + each, rows)) for start in range(0, rows, each))
        parts = await gather(self._call(method, request(call), list) for call in calls)
        return [answer for part in parts for answer in part]


@contextmanager
def serve_policy(config: RunConfig, application: str, tokenizer: str) -> Iterator[PolicyAddress | None]:
    """Bring the policy of `config` up on Ray Serve, and take it down at the end; nothing happens, and None is given,
    where the workers themselves write.

    Raises:
        InputError: it does not start.
    """
    if not isinstance(config.rollouts, ServedRollouts):
        yield None
        return
    rollouts = config.rollouts
    serve.start(proxy_location="Disabled")
    deployment.remove(application)  # what a killed run may have left asks a store that is gone
    # Of a name of its own, for one of a killed run may take a while to go.
    address = PolicyAddress(application, f"{application}.{uuid4().hex[:8]}")
    store = start_store(address.store, rollouts.deadline_seconds / 2)
    settings = {"run": config.model_dump(mode="json"), "tokenizer": tokenizer, "store": address.store}
    try:
        deployment.start_application(
            application, PolicyReplica, settings, rollouts.replicas, rollouts.resources, gpus=1.0,
            what=ServedPolicy.what,
        )  # fmt: skip
        yield address
    finally:
        deployment.remove(application)
        ray.kill(store)
