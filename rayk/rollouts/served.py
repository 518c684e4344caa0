"""Policy on Ray Serve, so that generation scales separately from training.

A request names its weight version, and the answer depends on the content of the request only (version, prompts,
parameters, seeds). So a request whose replica has died may be repeated at another one. `rayk.serving.weights` describes
the transfer of the weights.
"""

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import numpy as np
import ray
import torch

from rayk.config import RunConfig, ServedRollouts
from rayk.config.support import Logprob, TopK
from rayk.data.batches import micro_batches
from rayk.data.examples import Example
from rayk.engines.base import SamplingParameters
from rayk.engines.batching import gather
from rayk.engines.speculative import MixedSampling
from rayk.errors import InputError, PolicyUnavailable
from rayk.models import CausalLM
from rayk.rollouts.policy import Rollout, maximum_lengths, sampling_parameters, to_rollouts
from rayk.rollouts.replica import PolicyReplica
from rayk.rollouts.teacher_mixed import Verify
from rayk.serving import application as applications
from rayk.serving.client import ServedModel
from rayk.serving.event_loop import run_in_background
from rayk.serving.ownership import owned_by_this_job
from rayk.serving.requests import GenerateRequest, ScoreRequest, VersionedRequest
from rayk.serving.weight_store import PublishedWeights, WeightVersion, call_store, get_store, start_store
from rayk.serving.weights import checksum, pack_weights
from rayk.signals.sequence import TokenSequence

_ROWS_PER_CALL = 64


@dataclass(frozen=True)
class PolicyAddress:
    """Names of a run's policy application and of its weight store actor."""

    application: str
    store: str


class ServedPolicy(ServedModel):
    """One worker's client of the served policy; see `rayk.rollouts.Policy`.

    Args:
        publishes: whether this worker publishes its learner's weights for the replicas; true on one worker.
        dtype: type in which weights are published; None: the learner's own.
    """

    label = "The served policy"
    section = "rollouts"
    uses_learner = False
    unavailable = PolicyUnavailable

    def __init__(
        self, learner: CausalLM, settings: ServedRollouts, address: PolicyAddress, *, publishes: bool,
        dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__(address.application, in_flight=settings.in_flight, deadline_seconds=settings.deadline_seconds)
        self.parameters = sampling_parameters(settings)
        self._learner, self._publishes, self._dtype = learner, publishes, dtype
        self._group_tokens = settings.engine.batch_tokens * settings.replicas.max
        self._store = get_store(address.store)
        self._version = WeightVersion("", 0)

    def groups(self, prompts: Sequence[TokenSequence]) -> list[list[int]]:
        """See `Policy`. A group contains as many tokens as one batch on each replica."""
        return micro_batches(maximum_lengths(prompts, self.parameters), self._group_tokens)

    async def generate(
        self, prompts: Sequence[Example], parameters: SamplingParameters, seeds: Sequence[int]
    ) -> list[Rollout]:
        """See `Policy`."""
        version = self._version

        def request(rows: range) -> VersionedRequest:
            ids = [prompts[row].prompt_ids for row in rows]
            return VersionedRequest(version, GenerateRequest(ids, [seeds[row] for row in rows], parameters))

        work = self._call_in_parts("generate", len(prompts), request)
        return to_rollouts(prompts, await asyncio.wrap_future(run_in_background(work)), version.number)

    async def generate_mixed(
        self, prompts: Sequence[Example], verify: Verify, sampling: MixedSampling, seeds: Sequence[int]
    ) -> list[Rollout]:
        """Not supported by replicas; `RunConfig` rejects settings that require it."""
        raise InputError(
            "A served policy cannot sample from the mixture of teacher and student; use rollouts.kind 'worker'."
        )

    async def top_ids(self, sequences: Sequence[TokenSequence], k: int) -> list[np.ndarray]:
        """See `Policy`."""
        return await self._read(sequences, TopK(k))

    async def logprobs(self, sequences: Sequence[TokenSequence]) -> list[np.ndarray]:
        """See `Policy`."""
        return await self._read(sequences, Logprob())

    def begin(self, attempt: str) -> None:
        """See `Policy`."""
        self._version = WeightVersion(attempt, 0)
        if self._publishes:
            call_store(self._store, "begin", attempt)

    def update(self, version: int) -> None:
        """See `Policy`. Only the worker that publishes keeps the learner's weights."""
        self._version = WeightVersion(self._version.attempt, version)
        weights = pack_weights(self._learner, self._dtype, keep=self._publishes)
        if self._publishes:
            published = PublishedWeights(checksum(weights), ray.put(weights))
            call_store(self._store, "publish", self._version, published)

    def wait(self) -> None:
        """See `Policy`. Do nothing, because replicas have weights of their own."""

    async def _read(self, sequences: Sequence[TokenSequence], support: TopK | Logprob) -> list[np.ndarray]:
        version = self._version

        def request(rows: range) -> VersionedRequest:
            return VersionedRequest(version, ScoreRequest.from_sequences([sequences[row] for row in rows], support))

        return await asyncio.wrap_future(run_in_background(self._call_in_parts("read", len(sequences), request)))

    async def _call_in_parts(self, method: str, rows: int, request: Callable[[range], VersionedRequest]) -> list[Any]:
        """Return the results for all rows, in order, with the rows divided among the running replicas."""
        per_call = min(_ROWS_PER_CALL, max(1, math.ceil(rows / await self._credit.replicas())))
        calls = (range(start, min(start + per_call, rows)) for start in range(0, rows, per_call))
        parts = await gather(self._call(method, request(call), list) for call in calls)
        return [result for part in parts for result in part]


@contextmanager
def serve_policy(
    config: RunConfig, application: str, tokenizer: str, vocab_size: int | None = None, *,
    trained_ends: Sequence[int] = (),
) -> Iterator[PolicyAddress | None]:  # fmt: skip
    """Start the policy of `config` on Ray Serve and remove it at the end; yield None if rollouts are generated in the
    workers.

    Args:
        vocab_size: number of leading ids that completions may contain; None: all real tokens.
        trained_ends: ids of the tokens that end a completion in addition to the model's own ends.

    Raises:
        InputError: the policy does not start.
    """
    if not isinstance(config.rollouts, ServedRollouts):
        yield None
        return
    rollouts = config.rollouts
    applications.start_serve()
    applications.remove_application(application)  # one that a killed run has left refers to a store that has died
    # The store's name is unique, because the store of a killed run may still exist for a while.
    address = PolicyAddress(application, f"{application}.{uuid4().hex[:8]}")
    store = start_store(address.store, rollouts.deadline_seconds / 2)
    settings = {
        "student": config.student.model_dump(mode="json"), "rollouts": rollouts.model_dump(mode="json"),
        "precision": config.training.precision, "seed": config.seed, "tokenizer": tokenizer, "store": address.store,
        "vocab_size": vocab_size,
        "trained_ends": list(trained_ends),
        **owned_by_this_job(),
    }  # fmt: skip
    try:
        applications.start_application(
            application, PolicyReplica, settings, rollouts.replicas, rollouts.resources,
            gpus=rollouts.engine.gpus, label=ServedPolicy.label,
        )  # fmt: skip
        yield address
    finally:
        applications.remove_application(application)
        ray.kill(store)
