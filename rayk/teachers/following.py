"""Teachers that follow a student, this run's or another's: their replicas have the student's model, and each request
names the version of its weights that must answer it, as with a served policy (`rayk.serving.weights`).

The training worker that publishes the weights computes them (`rayk.training.following`). A replica with another version
loads the requested one when it computes nothing, so replicas may die, start and scale at any time.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar
from uuid import uuid4

import numpy as np
import ray
from torch import Tensor

from rayk.config import RunConfig, StudentConfig, TeacherConfig
from rayk.engines.base import Engine, EngineInfo, GeneratedSequence
from rayk.engines.build import set_threads
from rayk.models import DTYPES, Head, load_model, load_tokenizer, pick_device
from rayk.models.student import make_model
from rayk.serving import application as applications
from rayk.serving.autoscaling import Requester
from rayk.serving.event_loop import run_in_background
from rayk.serving.ownership import owned_by_this_job
from rayk.serving.requests import ScoreRequest, VersionedRequest
from rayk.serving.weight_store import (
    PublishedWeights,
    UnusableWeights,
    WeightVersion,
    call_store,
    find_weights,
    get_store,
    start_store,
)
from rayk.serving.weights import checksum, load_weights, pack_tensors
from rayk.teachers import deployment
from rayk.teachers.client import Teacher, read_head
from rayk.teachers.deployment import TeacherReplica

T = TypeVar("T")

_INITIAL = WeightVersion("", 0)
"""The weights before training, with which a replica starts."""
_LOADING = WeightVersion("", -1)
"""The version of a model whose weights are being replaced."""

_trained_steps: ContextVar[int | None] = ContextVar("trained_steps", default=None)


def use_weights_after(steps: int) -> None:
    """Let teachers that follow the student answer the requests of this task, and of the tasks that it starts, with
    their weights after `steps` optimizer steps; other requests are answered with the newest weights."""
    _trained_steps.set(steps)


class FollowingTeacher(Teacher):
    """Client of a teacher that follows a student.

    Args:
        store: name of the actor that stores the locations of the published weights.
    """

    def __init__(self, name: str, info: EngineInfo, settings: TeacherConfig, store: str, load_seconds: float):
        super().__init__(name, info, settings, None, load_seconds)
        self._store = get_store(store)
        self._newest = _INITIAL
        self._published: PublishedWeights | None = None
        self._heads: dict[WeightVersion, Future[Head]] = {}

    def version_after(self, steps: int) -> int:
        """Return the version of the teacher's weights after `steps` optimizer steps: the step of their last update."""
        return steps - steps % self.settings.every

    def begin(self, attempt: str, *, publishes: bool) -> None:
        """Start an attempt, on every worker before its first `publish`; weights of earlier attempts are dropped."""
        self._newest = WeightVersion(attempt, -1)
        self._heads.clear()
        if publishes:
            call_store(self._store, "begin", attempt)

    def publish(self, version: int, state: Mapping[str, Tensor] | None, *, publishes: bool) -> None:
        """Answer later requests with the weights in `state`, which the worker that `publishes` sends. All workers call
        it, each with its part of sharded weights.

        Args:
            state: None: the version has the weights that were published last.
        """
        self._newest = WeightVersion(self._newest.attempt, version)
        if state is not None:
            # Replicas would round the weights to their own type in any case.
            weights = pack_tensors(state, DTYPES.get(self.info.dtype), keep=publishes)
            self._published = PublishedWeights(checksum(weights), ray.put(weights)) if publishes else None
        if publishes:
            call_store(self._store, "publish", self._newest, self._published)

    async def _call(self, method: str, request: Any, read: Callable[[Any], T | Awaitable[T]]) -> T:
        return await super()._call(method, VersionedRequest(self._requested_version(), request), read)

    def _requested_version(self) -> WeightVersion:
        steps = _trained_steps.get()
        return self._newest if steps is None else WeightVersion(self._newest.attempt, self.version_after(steps))

    async def _get_head(self) -> Head:
        """Return the head of the requested version."""
        version = self._requested_version()
        if version not in self._heads:
            # Signals of few versions are requested at the same time; later ones replace them.
            for old in [old for old in self._heads if old.number < version.number - 2 * self.settings.every]:
                del self._heads[old]
            self._heads[version] = run_in_background(self._call("head", None, read_head))
        return await asyncio.wrap_future(self._heads[version])


class FollowingReplica(TeacherReplica):
    """One copy of a teacher that follows a student. Before it answers a request, it loads the weight version that the
    request names."""

    async def describe(self) -> tuple[EngineInfo, dict, float]:
        """Like `TeacherReplica.describe`, with the name of the weight store instead of the settings."""
        info, _, load_seconds = await super().describe()
        return info, {"store": self._store_name}, load_seconds

    def _build_engine(self, settings: Mapping[str, Any]) -> Engine:
        from rayk.engines.transformers import TransformersEngine

        teacher = TeacherConfig.model_validate(settings["teacher"])
        assert teacher.engine.kind == "transformers"
        set_threads(teacher)
        device = pick_device(teacher.engine.device)
        model: Any
        if teacher.model is not None:
            name, trusts = teacher.model, teacher.trust_remote_code
            tokenizer = load_tokenizer(name, trust_remote_code=trusts)
            model = load_model(name, dtype=teacher.engine.dtype, device=device, trust_remote_code=trusts).eval()
        else:
            student = StudentConfig.model_validate(settings["student"])
            name = student.model or "the student"
            tokenizer = load_tokenizer(settings["tokenizer"], trust_remote_code=student.trust_remote_code)
            model = make_model(student, tokenizer, settings["seed"], device).eval()
            for parameter in model.parameters():
                parameter.data = parameter.data.to(DTYPES[settings["dtype"]])
        self._store_name = settings["store"]
        self._weights = _ReplacedWeights(model, get_store(self._store_name))
        return TransformersEngine(name, teacher.engine, vocab_size=teacher.vocab_size, loaded=(model, tokenizer))

    async def score(self, request: Any, requester: Requester | None = None) -> np.ndarray:
        """Return the signals of the requested version, in wire format."""
        assert isinstance(request.request, ScoreRequest)
        async with self._weights.of_version(request.version):
            return await super().score(request.request, requester)

    async def head(self, request: Any = None, requester: Requester | None = None) -> list[ray.ObjectRef]:
        """Return the head of the requested version."""
        async with self._weights.of_version(request.version):
            self._head = None
            return await super().head()

    async def generate(self, request: Any, requester: Requester | None = None) -> list[GeneratedSequence]:
        """Return one completion per prompt, by the requested version."""
        async with self._weights.of_version(request.version):
            return await super().generate(request.request, requester)


class _ReplacedWeights:
    """The weights of a replica's model: requests of one version share them, others wait."""

    def __init__(self, model: Any, store: ray.actor.ActorHandle):
        self._model, self._store = model, store
        self._version = _INITIAL
        self._checksum: int | None = None
        self._users = 0
        self._changed = asyncio.Condition()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weights")

    @asynccontextmanager
    async def of_version(self, version: WeightVersion) -> AsyncIterator[None]:
        """Let the model have the weights of `version` inside the block.

        Raises:
            UnusableWeights: the version is not published, was replaced, or is damaged.
        """
        # Wait for the version before others, who may still need the current one, are kept out.
        published = None if version == self._version else await self._find(version)
        async with self._changed:
            await self._changed.wait_for(lambda: self._version == version or not self._users)
            if self._version != version:
                await self._load(version, published or await self._find(version))
                self._changed.notify_all()
            self._users += 1
        try:
            yield
        finally:
            async with self._changed:
                self._users -= 1
                self._changed.notify_all()

    async def _find(self, version: WeightVersion) -> PublishedWeights:
        if version == _INITIAL:
            raise UnusableWeights("The student's weights before training are gone: newer ones have replaced them.")
        return await find_weights(self._store, version)

    async def _load(self, version: WeightVersion, published: PublishedWeights) -> None:
        if published.checksum == self._checksum:
            self._version = version
            return
        weights = await published.weights
        # A request that is cancelled leaves the thread at work, and the next request loads its weights after that.
        self._version, self._checksum = _LOADING, None
        await asyncio.get_running_loop().run_in_executor(
            self._thread, load_weights, self._model, weights, published.checksum, version
        )
        self._version, self._checksum = version, published.checksum


def connect_following_teacher(application: str, settings: TeacherConfig) -> FollowingTeacher:
    """Connect to the teacher that `serve_following_teacher` started."""
    info, deployed, load_seconds = deployment.call_replica(application, "describe")
    return FollowingTeacher(application, info, settings, deployed["store"], load_seconds)


@contextmanager
def serve_following_teacher(teacher: TeacherConfig, config: RunConfig, application: str) -> Iterator[FollowingTeacher]:
    """Start a teacher of the run `config` that follows a student on Ray Serve, yield its client, and remove it at the
    end.

    Raises:
        InputError: the teacher does not start.
    """
    assert teacher.engine.kind == "transformers"
    applications.start_serve()
    applications.remove_application(application)  # one that a killed run has left refers to a store that has died
    # The store's name is unique, because the store of a killed run may still exist for a while.
    name = f"{application}.{uuid4().hex[:8]}"
    staleness = config.rollouts.max_staleness if config.rollouts else 0
    # Signals for steps up to `staleness` ahead may still be requested when a version is published.
    store = start_store(name, teacher.deadline_seconds / 2, staleness + 2)
    student = config.student.model_copy(update={"gradient_checkpointing": False})
    dtype = config.training.precision if teacher.engine.dtype == "auto" else teacher.engine.dtype
    settings = {
        "teacher": teacher.model_dump(mode="json"), "student": student.model_dump(mode="json"), "seed": config.seed,
        "tokenizer": student.tokenizer or student.model, "dtype": dtype, "store": name,
        **owned_by_this_job(),
    }  # fmt: skip
    try:
        applications.start_application(
            application, FollowingReplica, settings, teacher.replicas, teacher.resources, gpus=teacher.engine.gpus,
            label=f"Teacher '{teacher.name}'",
        )  # fmt: skip
        yield connect_following_teacher(application, teacher)
    finally:
        applications.remove_application(application)
        ray.kill(store)
