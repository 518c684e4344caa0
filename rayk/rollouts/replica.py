"""Replica of the served policy: answers each request with the weight version that the request names.

A `PolicyBackend` computes: transformers in this process (`TransformersBackend`), or vLLM
(`rayk.rollouts.vllm_backend`).
"""

from typing import Any, Protocol

import numpy as np
import ray
import torch

from rayk.config import ServedRollouts, StudentConfig
from rayk.config.support import TopK
from rayk.engines.base import GeneratedSequence, SamplingParameters
from rayk.engines.batching import MicroBatcher
from rayk.models import load_tokenizer, pick_device
from rayk.models.ends import set_end_token_ids
from rayk.models.student import make_model
from rayk.rollouts.policy_model import PolicyModel
from rayk.serving.autoscaling import METRIC, Requester
from rayk.serving.metrics import MeasuredDemand
from rayk.serving.ownership import watch_owner
from rayk.serving.requests import GenerateRequest, ScoreRequest, VersionedRequest
from rayk.serving.weight_store import PublishedWeights, WeightVersion, find_weights, get_store
from rayk.serving.weights import load_weights


class PolicyBackend(Protocol):
    """Computes the answers with the student's model, which has the weights of one version at a time."""

    async def answer(
        self, version: WeightVersion, published: PublishedWeights, mode: Any, items: list[Any], lengths: list[int]
    ) -> list[Any]:
        """Return one result per item, all computed with `version`.

        Args:
            mode: sampling parameters if the items are (prompt, seed) pairs; a support if they are sequences.
            lengths: largest length of each item, in tokens.
        """
        ...

    async def check_health(self) -> None:
        """Raise if this replica must be replaced."""
        ...


class PolicyReplica:
    """One copy of the policy. Before it answers a request, it loads the weight version that the request names."""

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
        set_end_token_ids(model, tokenizer, settings["trained_ends"])
        policy_model = PolicyModel(model, tokenizer, settings["precision"], settings["vocab_size"])
        self._store = get_store(settings["store"])
        self._demand = MeasuredDemand()
        self._backend: PolicyBackend
        if engine.kind == "vllm":
            from rayk.rollouts.vllm_backend import start_vllm

            self._backend = await start_vllm(
                policy_model, student, engine, tokenizer=settings["tokenizer"], precision=settings["precision"]
            )
        else:
            self._backend = TransformersBackend(policy_model, engine.batch_tokens)
        self._watch = watch_owner(settings)

    async def generate(
        self, versioned: VersionedRequest, requester: Requester | None = None
    ) -> list[GeneratedSequence]:
        """Return one completion per prompt."""
        request = versioned.request
        assert isinstance(request, GenerateRequest)
        lengths = [len(prompt) + request.parameters.max_new_tokens for prompt in request.prompts]
        items = list(zip(request.prompts, request.seeds, strict=True))
        completions = await self._answer(versioned, requester, request.parameters, items, lengths)
        self._demand.count(generated=sum(len(completion.token_ids) for completion in completions))
        return completions

    async def read(self, versioned: VersionedRequest, requester: Requester | None = None) -> list[np.ndarray]:
        """Return, at each sequence's counted tokens, the most likely ids (support `topk`) or the token's log-prob
        (support `logprob`); see `rayk.rollouts.Policy`."""
        request = versioned.request
        assert isinstance(request, ScoreRequest)
        sequences = request.sequences()
        lengths = [len(sequence) for sequence in sequences]
        results = await self._answer(versioned, requester, request.support, sequences, lengths)
        self._demand.count(scored=request.tokens)
        return results

    async def check_health(self) -> None:
        await self._backend.check_health()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the metric that `rayk.serving.autoscaling.WaitingTokensPolicy` reads."""
        return {METRIC: float(self._demand.waiting_tokens())}

    async def _answer(
        self, versioned: VersionedRequest, requester: Requester | None, mode: Any, items: list[Any], lengths: list[int]
    ) -> list[Any]:
        with self._demand.track_request(requester, versioned.tokens):
            # Wait for the version here and not in the backend, which may still be computing with an older version.
            published = await find_weights(self._store, versioned.version)
            return await self._backend.answer(versioned.version, published, mode, items, lengths)


class TransformersBackend:
    """The student in transformers; each batch is computed with one version."""

    def __init__(self, policy_model: PolicyModel, batch_tokens: int):
        self._model = policy_model
        self._version: WeightVersion | None = None
        self._batcher = MicroBatcher(self._run, batch_tokens)
        self._fatal: Exception | None = None

    async def answer(
        self, version: WeightVersion, published: PublishedWeights, mode: Any, items: list[Any], lengths: list[int]
    ) -> list[Any]:
        """See `PolicyBackend`."""
        return await self._batcher.submit((version, published, mode), items, lengths)

    async def check_health(self) -> None:
        """See `PolicyBackend`."""
        if self._fatal is not None:
            raise RuntimeError(f"The device failed: {self._fatal}")

    def _run(self, key: Any, items: list[Any]) -> list[Any]:
        version, published, mode = key
        try:
            if version != self._version:
                self._version = None
                load_weights(self._model.model, ray.get(published.weights), published.checksum, version)
                self._version = version
            with self._model.inference_context():
                if isinstance(mode, SamplingParameters):
                    prompts, seeds = zip(*items, strict=True)
                    return self._model.generate(prompts, mode, seeds)
                return self._model.top_ids(items, mode.k) if isinstance(mode, TopK) else self._model.logprobs(items)
        except torch.AcceleratorError as error:
            self._fatal = error  # a CUDA context does not recover; the failed health check replaces the replica
            raise
