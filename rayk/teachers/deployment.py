"""The Serve side of a teacher: replicas that hold an engine, and bringing them up and down."""

import os
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import ray
from ray import serve
from ray.serve.schema import ApplicationStatus

from rayk.config import EngineConfig, PolicyEngineConfig, TeacherConfig, VLLMPolicyEngineConfig
from rayk.config.support import Requested, Support
from rayk.engines.base import Engine, EngineInfo, GeneratedSequence, SamplingParameters, Usage, VerifyingEngine
from rayk.engines.checks import check_can_verify
from rayk.engines.speculative import Draft, Verdict
from rayk.errors import InputError
from rayk.models import pack_head
from rayk.serving.application import DEPLOYMENT, start_application
from rayk.serving.autoscaling import METRIC, Demand, Requester
from rayk.signals.batch import encode
from rayk.signals.sequence import TokenSequence


@dataclass(frozen=True)
class ScoreRequest:
    """Sequences to score, packed: one array of ids for all rows and one bit a token for what counts."""

    input_ids: np.ndarray
    counted_bits: np.ndarray
    lengths: np.ndarray
    support: Support
    requested: np.ndarray | None = None

    @classmethod
    def of(cls, sequences: list[TokenSequence], support: Support) -> "ScoreRequest":
        return cls(
            np.concatenate([sequence.input_ids for sequence in sequences]),
            np.packbits(np.concatenate([sequence.counted for sequence in sequences])),
            np.asarray([len(sequence) for sequence in sequences]),
            support,
            np.concatenate([s.requested for s in sequences if s.requested is not None])
            if isinstance(support, Requested) and sequences[0].requested is not None
            else None,
        )

    @property
    def tokens(self) -> int:
        """Tokens to be read."""
        return len(self.input_ids)

    def sequences(self) -> list[TokenSequence]:
        counted = np.unpackbits(self.counted_bits, count=len(self.input_ids)).astype(bool)
        ends = np.cumsum(self.lengths)[:-1]
        rows = zip(np.split(self.input_ids, ends), np.split(counted, ends), strict=True)
        if self.requested is None:
            return [TokenSequence(*row) for row in rows]
        asked = np.cumsum([np.count_nonzero(each) for each in np.split(counted, ends)])[:-1]
        return [TokenSequence(*row, each) for row, each in zip(rows, np.split(self.requested, asked), strict=True)]


@dataclass(frozen=True)
class GenerateRequest:
    """Prompts (text, or token ids) to continue, each with its own seed."""

    prompts: list[str] | list[np.ndarray]
    seeds: list[int]
    parameters: SamplingParameters = field(default_factory=SamplingParameters)

    @property
    def tokens(self) -> int:
        """Tokens that may be written."""
        return len(self.prompts) * self.parameters.max_new_tokens


@dataclass(frozen=True)
class VerifyRequest:
    """Drafts to verify."""

    drafts: list[Draft]

    @property
    def tokens(self) -> int:
        """Tokens to be read by a replica that still holds what comes before the drafts."""
        return sum(1 + draft.drafted for draft in self.drafts)


class TeacherReplica:
    """One copy of a teacher. Requests are pure functions of their content (generation is seeded), so a client may ask
    another replica again after a death without harm."""

    async def __init__(self, settings: dict):  # type: ignore[misc]  # Serve awaits it
        config = TeacherConfig.model_validate(settings)
        self._settings = settings
        self._engine = build_engine(config)
        self._head: ray.ObjectRef | None = None
        self._demand = Demand()
        await self._engine.warm_up()

    async def describe(self) -> tuple[EngineInfo, dict]:
        return self._engine.info, self._settings

    async def score(self, request: ScoreRequest, asker: Requester | None = None) -> np.ndarray:
        """The signals' wire form (`rayk.signals.batch.decode`)."""
        with self._demand.answering(asker, request.tokens):
            return encode(await self._engine.score(request.sequences(), request.support))

    async def head(self, _request: None = None, _asker: Requester | None = None) -> list[ray.ObjectRef]:
        """The teacher's head, put into the object store once: a node's processes then share one copy."""
        if self._head is None:
            self._head = ray.put(pack_head(self._engine.head()))
        return [self._head]

    async def generate(self, request: GenerateRequest, asker: Requester | None = None) -> list[GeneratedSequence]:
        """A continuation for each prompt."""
        with self._demand.answering(asker, request.tokens):
            return await self._engine.generate(request.prompts, request.parameters, request.seeds)

    async def verify(self, request: VerifyRequest, asker: Requester | None = None) -> list[Verdict]:
        """A verdict for each draft."""
        check_can_verify(self._engine.info)
        with self._demand.answering(asker, request.tokens):
            return await cast(VerifyingEngine, self._engine).verify(request.drafts)

    async def usage(self, _request: None = None, _asker: Requester | None = None) -> Usage | None:
        """What a paid endpoint was asked for since the replica started; None with any other engine."""
        return getattr(self._engine, "usage", None)

    async def check_health(self) -> None:
        await self._engine.check_health()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve passes to `rayk.serving.autoscaling.WaitingTokensPolicy`."""
        return {METRIC: float(self._demand.waiting_tokens())}


def build_engine(config: TeacherConfig) -> Engine:
    """The engine `config.engine.kind` names, in this process."""
    assert config.model is not None
    if config.engine.kind == "vllm":
        from rayk.engines.vllm import VLLMEngine

        return VLLMEngine(config.model, config.engine, trust_remote_code=config.trust_remote_code)

    if config.engine.kind == "openai":
        from rayk.engines.openai import OpenAIEngine

        return OpenAIEngine(config.model, config.engine)

    if config.engine.kind == "simulated":
        from rayk.engines.simulated import SimulatedEngine

        return SimulatedEngine(config.model, config.engine, trust_remote_code=config.trust_remote_code)

    import torch

    from rayk.engines.transformers import TransformersEngine

    threads = config.engine.threads or max(1, int(config.resources.num_cpus))
    if config.engine.device == "cpu" or not torch.cuda.is_available():
        torch.set_num_threads(threads)
    return TransformersEngine(config.model, config.engine, trust_remote_code=config.trust_remote_code)


def deploy(config: TeacherConfig) -> None:
    """Start the Serve application `config.name` and wait until every replica is warm.

    Raises:
        InputError: the model cannot be loaded.
    """
    start_application(
        config.name, TeacherReplica, _replica_settings(config), config.replicas, config.resources,
        gpus=gpus_per_replica(config.engine), what=f"Teacher '{config.name}'",
        across_nodes=config.engine.kind == "vllm" and config.engine.across_nodes,
    )  # fmt: skip


def is_running(config: TeacherConfig) -> bool:
    """Whether just this teacher runs, as it does where the run that brought it up was killed.

    Raises:
        InputError: an application of that name with other settings runs.
    """
    serve.start(proxy_location="Disabled")
    application = serve.status().applications.get(config.name)
    if application is None or application.status != ApplicationStatus.RUNNING:
        return False
    handle = serve.get_deployment_handle(DEPLOYMENT, app_name=config.name)
    if handle.describe.remote().result(timeout_s=60)[1] != _replica_settings(config):
        raise InputError(
            f"A teacher '{config.name}' with other settings runs on this cluster; choose another name, or use that one "
            "with 'attach: true'."
        )
    return True


def gpus_per_replica(engine: EngineConfig | PolicyEngineConfig | VLLMPolicyEngineConfig) -> float:
    """GPUs of one replica with such an engine."""
    if engine.kind == "openai":
        return 0.0
    return engine.tensor_parallel_size if engine.kind == "vllm" else 1.0


def _replica_settings(config: TeacherConfig) -> dict:
    """What replicas are told; a folder's path is made absolute, for they have a working directory of their own."""
    assert config.model is not None
    folder = os.path.abspath(os.path.expanduser(config.model))
    is_path = config.model.startswith((".", "~")) or os.path.isdir(folder)
    return config.model_copy(update={"model": folder} if is_path else {}).model_dump(mode="json")
