"""The Serve side of a teacher: replicas that hold an engine, and bringing them up and down."""

import logging
import os
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import ray
from ray import serve
from ray.serve.schema import ApplicationStatus, ReplicaState

from rayk.cluster import gpus_each, is_own
from rayk.config import EngineConfig, PolicyEngine, Replicas, Resources, TeacherConfig, VLLMPolicyEngine
from rayk.engines.base import Engine, EngineInfo, Generated, SamplingParameters, Usage, VerifyingEngine
from rayk.engines.checks import check_verifies
from rayk.environment import THREADING
from rayk.errors import InputError
from rayk.models import pack_head
from rayk.sequences import Sequence
from rayk.signal import encode
from rayk.speculative import Draft, Verdict
from rayk.support import Requested, Support
from rayk.teachers.autoscaling import METRIC, Asker, Demand

logger = logging.getLogger(__name__)

DEPLOYMENT = "teacher"
"""Its name in a teacher's application, and in the policy's (`rayk.rollouts.served`)."""
# Far above what credit-bound clients keep open; at Serve's default of 5 its router probes full replicas again and
# again, and 200 calls in flight ran ten times slower than one by one (PLATFORM §4).
_MAX_ONGOING_REQUESTS = 1000
_HEALTH_CHECK_SECONDS = 5.0  # Serve replaces a replica after the third failed one
_START_ATTEMPTS = 2
_REPORT_SECONDS = 10.0  # how often Serve's autoscaler hears of a replica's load
_LOOK_BACK_SECONDS = 10.5  # what it averages over; Serve wants more than the former


@dataclass(frozen=True)
class ScoreRequest:
    """Sequences to score, packed: one array of ids for all rows and one bit a token for what counts."""

    input_ids: np.ndarray
    counted_bits: np.ndarray
    lengths: np.ndarray
    support: Support
    requested: np.ndarray | None = None

    @classmethod
    def of(cls, sequences: list[Sequence], support: Support) -> "ScoreRequest":
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

    def sequences(self) -> list[Sequence]:
        counted = np.unpackbits(self.counted_bits, count=len(self.input_ids)).astype(bool)
        ends = np.cumsum(self.lengths)[:-1]
        rows = zip(np.split(self.input_ids, ends), np.split(counted, ends), strict=True)
        if self.requested is None:
            return [Sequence(*row) for row in rows]
        asked = np.cumsum([np.count_nonzero(each) for each in np.split(counted, ends)])[:-1]
        return [Sequence(*row, each) for row, each in zip(rows, np.split(self.requested, asked), strict=True)]


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

    async def score(self, request: ScoreRequest, asker: Asker | None = None) -> np.ndarray:
        """The signals' wire form (`rayk.signal.decode`)."""
        with self._demand.answering(asker, request.tokens):
            return encode(await self._engine.score(request.sequences(), request.support))

    async def head(self, _request: None = None, _asker: Asker | None = None) -> list[ray.ObjectRef]:
        """The teacher's head, put into the object store once: a node's processes then share one copy."""
        if self._head is None:
            self._head = ray.put(pack_head(self._engine.head()))
        return [self._head]

    async def generate(self, request: GenerateRequest, asker: Asker | None = None) -> list[Generated]:
        """A continuation for each prompt."""
        with self._demand.answering(asker, request.tokens):
            return await self._engine.generate(request.prompts, request.parameters, request.seeds)

    async def verify(self, request: VerifyRequest, asker: Asker | None = None) -> list[Verdict]:
        """A verdict for each draft."""
        check_verifies(self._engine.info)
        with self._demand.answering(asker, request.tokens):
            return await cast(VerifyingEngine, self._engine).verify(request.drafts)

    async def usage(self, _request: None = None, _asker: Asker | None = None) -> Usage | None:
        """What a paid endpoint was asked for since the replica started; None with any other engine."""
        return getattr(self._engine, "usage", None)

    async def check_health(self) -> None:
        await self._engine.check_health()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve passes to `rayk.teachers.autoscaling.WaitingTokensPolicy`."""
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
        config.name, TeacherReplica, _settings_of(config), config.replicas, config.resources,
        gpus=gpus_needed(config.engine), what=f"Teacher '{config.name}'",
        across_nodes=config.engine.kind == "vllm" and config.engine.across_nodes,
    )  # fmt: skip


def start_application(
    name: str, replica: type, settings: dict, replicas: Replicas, resources: Resources, *, gpus: float, what: str,
    across_nodes: bool = False,
) -> None:  # fmt: skip
    """Start Serve application `name`, so many copies of `replica(settings)`, and wait until every one stands.

    Args:
        replica: reports waiting tokens for autoscaling, as `TeacherReplica` does.
        gpus: what each needs, where `resources` does not say and the cluster has any.
        what: how errors and warnings call it.
        across_nodes: the GPUs of one may lie on several nodes.

    Raises:
        InputError: they do not start.
    """
    serve.start(proxy_location="Disabled")
    gpus = gpus_each(resources.num_gpus, gpus)
    options: dict[str, Any] = {
        **placement(resources, gpus, across_nodes),
        "name": DEPLOYMENT,
        "max_ongoing_requests": _MAX_ONGOING_REQUESTS,
        "health_check_period_s": _HEALTH_CHECK_SECONDS,
        "graceful_shutdown_timeout_s": 5,
        "graceful_shutdown_wait_loop_s": 0.2,
        "max_constructor_retry_count": _START_ATTEMPTS,
    }
    if replicas.min == replicas.max:
        options["num_replicas"] = replicas.min
    else:
        options["autoscaling_config"] = {
            "min_replicas": replicas.min,
            "initial_replicas": max(1, replicas.min),  # the model is to be seen to load
            "max_replicas": replicas.max,
            "metrics_interval_s": _REPORT_SECONDS,
            "look_back_period_s": _LOOK_BACK_SECONDS,
            "upscale_delay_s": replicas.up_seconds,
            "downscale_delay_s": replicas.down_seconds,
            "policy": {
                "policy_function": "rayk.teachers.autoscaling:WaitingTokensPolicy",
                "policy_kwargs": {"tokens_a_replica": replicas.waiting_tokens},
            },
        }
    _warn_where_short(what, replicas.min, {"CPU": resources.num_cpus, "GPU": gpus, **resources.custom})
    application = serve.deployment(replica).options(**options).bind(settings)
    try:
        serve.run(application, name=name, route_prefix=None, logging_config={"log_level": "WARNING"})
    except RuntimeError as error:
        reason = failure_of(name) or str(error)
        raise InputError(f"{what} did not start: {reason}") from error


def placement(resources: Resources, gpus: float, across_nodes: bool) -> dict[str, Any]:
    """Serve's options that say where a replica stands.

    Args:
        gpus: of one replica.
        across_nodes: a bundle for each of them, on as few nodes as it takes. The replica is in the first with its CPUs
            and custom resources, and holds no GPU itself, so that what it starts in the group can have them all.
    """
    grouped = across_nodes and gpus >= 1
    actor = {
        "num_cpus": resources.num_cpus, "num_gpus": 0.0 if grouped else gpus, "resources": resources.custom,
        "runtime_env": {} if is_own() else {"env_vars": THREADING},
    }  # fmt: skip
    if not grouped:
        return {"ray_actor_options": actor}
    first = {"CPU": resources.num_cpus, "GPU": 1.0, **resources.custom}
    bundles = [first, *({"GPU": 1.0} for _ in range(int(gpus) - 1))]
    return {"ray_actor_options": actor, "placement_group_bundles": bundles, "placement_group_strategy": "PACK"}


def already_runs(config: TeacherConfig) -> bool:
    """Whether just this teacher runs, as it does where the run that brought it up was killed.

    Raises:
        InputError: an application of that name with other settings runs.
    """
    serve.start(proxy_location="Disabled")
    application = serve.status().applications.get(config.name)
    if application is None or application.status != ApplicationStatus.RUNNING:
        return False
    handle = serve.get_deployment_handle(DEPLOYMENT, app_name=config.name)
    if handle.describe.remote().result(timeout_s=60)[1] != _settings_of(config):
        raise InputError(
            f"A teacher '{config.name}' with other settings runs on this cluster; choose another name, or use that one "
            "with 'attach: true'."
        )
    return True


def gpus_needed(engine: EngineConfig | PolicyEngine | VLLMPolicyEngine) -> float:
    """GPUs of one replica with such an engine."""
    if engine.kind == "openai":
        return 0.0
    return engine.tensor_parallel_size if engine.kind == "vllm" else 1.0


def _settings_of(config: TeacherConfig) -> dict:
    """What replicas are told; a folder's path is made absolute, for they have a working directory of their own."""
    assert config.model is not None
    folder = os.path.abspath(os.path.expanduser(config.model))
    is_path = config.model.startswith((".", "~")) or os.path.isdir(folder)
    return config.model_copy(update={"model": folder} if is_path else {}).model_dump(mode="json")


def _warn_where_short(what: str, replicas: int, needs: dict[str, float]) -> None:
    """Say what the cluster lacks: Serve waits for it without a word, rightly so where a cluster grows on demand."""
    there = ray.cluster_resources()
    for name, each in needs.items():
        if each * replicas > there.get(name, 0):
            logger.warning(
                "%s asks for %g %s in all, but the cluster has %g now: waiting until it has more.",
                what, each * replicas, name, there.get(name, 0),
            )  # fmt: skip


def failure_of(name: str) -> str:
    """Why application `name` is not healthy, as its replicas said it; empty when nothing is known."""
    application = serve.status().applications.get(name)
    if application is None:
        return ""
    texts = [application.message, *(d.message for d in application.deployments.values())]
    for text in texts:
        for line in reversed(text.splitlines()):
            if "Error: " in line:
                return line.split("Error: ", 1)[1].strip()
    return ""


def running_replicas(name: str) -> int:
    """How many replicas of application `name` run."""
    application = serve.status().applications.get(name)
    deployments = application.deployments if application else {}
    return sum(d.replica_states.get(ReplicaState.RUNNING, 0) for d in deployments.values())


def remove(name: str) -> None:
    """Take application `name` down; nothing happens where it does not exist."""
    serve.delete(name)
