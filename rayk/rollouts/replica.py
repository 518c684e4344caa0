"""A replica of the served policy: answers each request under the version of the weights it names.

Who computes is a `PolicyBackend`: transformers in this process (`TransformersBackend`), or vLLM (`rayk.rollouts.vllm_backend`).
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

from rayk.config import ServedRollouts, StudentConfig
from rayk.config.support import TopK
from rayk.engines.base import GeneratedSequence, SamplingParameters
from rayk.engines.batching import MicroBatcher
from rayk.models import load_tokenizer, pick_device
from rayk.models.student import make_model
from rayk.rollouts.policy_model import PolicyModel
from rayk.serving.autoscaling import METRIC, Demand, Requester
from rayk.serving.weight_store import PublishedWeights, UnusableWeights, WeightVersion, get_store
from rayk.serving.weights import load_weights
from rayk.teachers.deployment import GenerateRequest, ScoreRequest


@dataclass(frozen=True)
class VersionedRequest:
    """A request, and the weights it is to be answered under."""

    version: WeightVersion
    request: GenerateRequest | ScoreRequest

    @property
    def tokens(self) -> int:
        return self.request.tokens


class PolicyBackend(Protocol):
    """Holds the student's model, and the weights of one version at a time."""

    async def answer(
        self, version: WeightVersion, published: PublishedWeights, how: Any, items: list[Any], lengths: list[int]
    ) -> list[Any]:
        """One answer an item, all under `version`.

        Args:
            how: sampling parameters, where the items are prompts and seeds; a support, where they are sequences.
            lengths: what each item may come to, in tokens.
        """
        ...

    async def check_health(self) -> None:
        """Raise where this replica must be replaced."""
        ...


class PolicyReplica:
    """One copy of the policy. It begins without weights of its own and takes over those of each request's version."""

    async def __init__(self, settings: dict):  # type: ignore[misc]  # Serve awaits it
        student = StudentConfig.model_validate(settings["student"])
        rollouts = ServedRollouts.model_validate(settings["rollouts"])
        engine = rollouts.engine
        device = pick_device(engine.device) if engine.kind == "transformers" else "cpu"
        if device == "cpu":
            threads = engine.threads if engine.kind == "transformers" else None
            torch.set_num_threads(threads or max(1, int(rollouts.resources.num_cpus)))
        tokenizer = load_tokenizer(settings["tokenizer"], trust_remote_code=student.trust_remote_code)
        model = make_model(student, tokenizer, settings["seed"], device).eval()
        writer = PolicyModel(model, tokenizer, settings["precision"])
        self._store = get_store(settings["store"])
        self._demand = Demand()
        self._computer: PolicyBackend
        if engine.kind == "vllm":
            from rayk.rollouts.vllm_backend import start_vllm

            self._computer = await start_vllm(
                writer, student, engine, tokenizer=settings["tokenizer"], precision=settings["precision"]
            )
        else:
            self._computer = TransformersBackend(writer, engine.batch_tokens)

    async def generate(self, asked: VersionedRequest, asker: Requester | None = None) -> list[GeneratedSequence]:
        """A continuation for each prompt."""
        request = asked.request
        assert isinstance(request, GenerateRequest)
        lengths = [len(prompt) + request.parameters.max_new_tokens for prompt in request.prompts]
        items = list(zip(request.prompts, request.seeds, strict=True))
        return await self._answer(asked, asker, request.parameters, items, lengths)

    async def read(self, asked: VersionedRequest, asker: Requester | None = None) -> list[np.ndarray]:
        """At each sequence's counted positions the likeliest ids (support `topk`), or the log-prob of the token there
        (`logprob`); see `rayk.rollouts.Policy`."""
        request = asked.request
        assert isinstance(request, ScoreRequest)
        sequences = request.sequences()
        return await self._answer(asked, asker, request.support, sequences, [len(each) for each in sequences])

    async def check_health(self) -> None:
        await self._computer.check_health()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve passes to `rayk.serving.autoscaling.WaitingTokensPolicy`."""
        return {METRIC: float(self._demand.waiting_tokens())}

    async def _answer(
        self, asked: VersionedRequest, asker: Requester | None, how: Any, items: list[Any], lengths: list[int]
    ) -> list[Any]:
        with self._demand.answering(asker, asked.tokens):
            # Waited for here, not where it is computed: others may still need an older version.
            published = await self._find(asked.version)
            return await self._computer.answer(asked.version, published, how, items, lengths)

    async def _find(self, version: WeightVersion) -> PublishedWeights:
        try:
            return await self._store.find.remote(version)
        except RayTaskError as error:
            raise error.cause from None
        except RayActorError:
            raise UnusableWeights("The actor that knows where the student's weights are has died.") from None


class TransformersBackend:
    """The student in transformers, a batch at a time, each under one version."""

    def __init__(self, writer: PolicyModel, batch_tokens: int):
        self._writer = writer
        self._version: WeightVersion | None = None
        self._batcher = MicroBatcher(self._run, batch_tokens)
        self._fatal: Exception | None = None

    async def answer(
        self, version: WeightVersion, published: PublishedWeights, how: Any, items: list[Any], lengths: list[int]
    ) -> list[Any]:
        """See `PolicyBackend`."""
        return await self._batcher.submit((version, published, how), items, lengths)

    async def check_health(self) -> None:
        """See `PolicyBackend`."""
        if self._fatal is not None:
            raise RuntimeError(f"The device failed: {self._fatal}")

    def _run(self, key: Any, items: list[Any]) -> list[Any]:
        version, published, how = key
        try:
            if version != self._version:
                self._version = None
                load_weights(self._writer.model, ray.get(published.weights), published.checksum, version)
                self._version = version
            with self._writer.computing():
                if isinstance(how, SamplingParameters):
                    prompts, seeds = zip(*items, strict=True)
                    return self._writer.generate(prompts, how, seeds)
                return self._writer.top_ids(items, how.k) if isinstance(how, TopK) else self._writer.logprobs(items)
        except torch.AcceleratorError as error:
            self._fatal = error  # a CUDA context does not recover: the health check has the replica replaced
            raise
