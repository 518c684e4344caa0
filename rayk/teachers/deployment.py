"""The Ray Serve application of a teacher: the class of its replicas, deploying it, and querying its state."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import ray
from ray import serve
from ray.serve.schema import ApplicationStatus

from rayk.config import TeacherConfig
from rayk.config.paths import resolve_path
from rayk.engines.base import Engine, EngineInfo, GeneratedSequence, Usage, VerifyingEngine
from rayk.engines.build import build_engine
from rayk.engines.checks import check_can_verify
from rayk.engines.speculative import Draft, Verdict
from rayk.errors import InputError
from rayk.models import pack_head
from rayk.serving.application import DEPLOYMENT, bind_application, start_application, start_serve
from rayk.serving.autoscaling import METRIC, Requester
from rayk.serving.event_loop import run_in_background, wait_for
from rayk.serving.metrics import MeasuredDemand
from rayk.serving.ownership import is_being_removed, owned_by_nobody, owned_by_this_job, watch_owner
from rayk.serving.requests import GenerateRequest, ScoreRequest
from rayk.signals.wire import encode

_CALL_SECONDS = 60.0


@dataclass(frozen=True)
class VerifyRequest:
    """Drafts to verify."""

    drafts: list[Draft]

    @property
    def tokens(self) -> int:
        """Number of tokens that a replica reads if its cache contains the text before the drafts."""
        return sum(1 + draft.drafted for draft in self.drafts)


class TeacherReplica:
    """One copy of a teacher.

    The answer depends on the content of the request only (generation is seeded), so a client may repeat a request at
    another replica.
    """

    async def __init__(self, settings: dict):  # type: ignore[misc]  # Serve awaits it
        began = time.monotonic()
        self._settings, self._owner = settings["teacher"], settings["owner"]
        self._engine = self._build_engine(settings)
        self._head: ray.ObjectRef | None = None
        self._demand = MeasuredDemand()
        await self._engine.warm_up()
        self._load_seconds = time.monotonic() - began
        self._watch = watch_owner(settings)

    def _build_engine(self, settings: Mapping[str, Any]) -> Engine:
        return build_engine(TeacherConfig.model_validate(settings["teacher"]))

    async def describe(self) -> tuple[EngineInfo, dict, float]:
        """Return the engine's properties, the settings with which the teacher was deployed, and the seconds that this
        replica took to load."""
        return self._engine.info, self._settings, self._load_seconds

    async def owner(self) -> str:
        """Return the id of the Ray job that deployed this teacher."""
        return self._owner

    async def score(self, request: ScoreRequest, requester: Requester | None = None) -> np.ndarray:
        """Return the signals in wire format (`rayk.signals.wire.decode`)."""
        with self._demand.track_request(requester, request.tokens):
            signals = await self._engine.score(request.sequences(), request.support)
            self._demand.count(scored=request.tokens)
            return encode(signals)

    async def head(self, _request: None = None, _requester: Requester | None = None) -> list[ray.ObjectRef]:
        """Return the teacher's head as a reference into the object store; processes of a node share one copy."""
        if self._head is None:
            head = await asyncio.to_thread(self._engine.head)  # it may have to be read from disk
            self._head = ray.put(pack_head(head))
        return [self._head]

    async def generate(self, request: GenerateRequest, requester: Requester | None = None) -> list[GeneratedSequence]:
        """Return one completion per prompt."""
        with self._demand.track_request(requester, request.tokens):
            completions = await self._engine.generate(request.prompts, request.parameters, request.seeds)
            self._demand.count(generated=sum(len(completion.token_ids) for completion in completions))
            return completions

    async def verify(self, request: VerifyRequest, requester: Requester | None = None) -> list[Verdict]:
        """Return one verdict per draft."""
        check_can_verify(self._engine.info)
        with self._demand.track_request(requester, request.tokens):
            return await cast(VerifyingEngine, self._engine).verify(request.drafts)

    async def usage(self, _request: None = None, _requester: Requester | None = None) -> Usage | None:
        """Return the usage of a paid endpoint since the replica started; None for all other engines."""
        return getattr(self._engine, "usage", None)

    async def check_health(self) -> None:
        await self._engine.check_health()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the metric that `rayk.serving.autoscaling.WaitingTokensPolicy` reads."""
        return {METRIC: float(self._demand.waiting_tokens())}


def deploy(config: TeacherConfig, application: str, *, detached: bool = False) -> None:
    """Start Serve application `application` for a teacher and wait until all replicas have warmed up.

    Args:
        detached: it stays after the end of this job.

    Raises:
        InputError: the replicas do not start, for example because the model cannot be loaded.
    """
    owned = owned_by_nobody() if detached else owned_by_this_job()
    start_application(
        application, TeacherReplica, {"teacher": _replica_settings(config, application), **owned}, config.replicas,
        config.resources, gpus=config.engine.gpus, label=f"Teacher '{application}'",
        across_nodes=config.engine.spans_nodes,
    )  # fmt: skip


def build_application(teacher: dict[str, Any]) -> serve.Application:
    """Return the application of a teacher for Serve's config files, such as `serveConfigV2` of a KubeRay RayService:

        applications: [{name: NAME, route_prefix: null, import_path: "rayk.teachers.deployment:build_application",
                        args: {name: NAME, model: …, engine: …, resources: …}}]

    Runs on its cluster use it with `teachers: [{name: NAME, attach: true}]`.

    Args:
        teacher: the teacher's settings, as in a run's config; without `resources.num_gpus` a replica takes the GPUs
            that its engine needs.
    """
    config = TeacherConfig.model_validate(teacher)
    needed = config.resources.num_gpus
    return bind_application(
        TeacherReplica, {"teacher": _replica_settings(config, config.name), **owned_by_nobody()}, config.replicas,
        config.resources, gpus=config.engine.gpus if needed is None else needed, across_nodes=config.engine.spans_nodes,
    )  # fmt: skip


def is_running(config: TeacherConfig, application: str) -> bool:
    """Return whether this teacher already runs with the same settings; False also if its application is still starting,
    has failed or is being removed.

    Raises:
        InputError: the application runs with other settings.
    """
    start_serve()
    status = serve.status().applications.get(application)
    if status is None or status.status != ApplicationStatus.RUNNING:
        return False
    if call_replica(application, "describe")[1] != _replica_settings(config, application):
        raise InputError(
            f"A teacher '{application}' with other settings runs on this cluster; choose another name, or use that one "
            "with 'attach: true'."
        )
    return not is_being_removed(application, deployer(application))


def deployer(application: str) -> str:
    """Return the id of the Ray job that deployed this running teacher."""
    return call_replica(application, "owner")


def call_replica(application: str, method: str) -> Any:
    """Call a method without arguments on one replica and return the result; works inside a running event loop, too.

    Raises:
        TimeoutError: no answer within `_CALL_SECONDS`.
    """
    handle = serve.get_deployment_handle(DEPLOYMENT, app_name=application)

    async def call() -> Any:
        async with asyncio.timeout(_CALL_SECONDS):
            return await getattr(handle, method).remote()

    return wait_for(run_in_background(call()))


def _replica_settings(config: TeacherConfig, application: str) -> dict:
    """Return the settings for the replicas, with the application as name and an absolute path of a local model:
    replicas have another working directory."""
    assert config.model is not None
    changes = {"name": application, "model": resolve_path(config.model)}
    return config.model_copy(update=changes).model_dump(mode="json")
