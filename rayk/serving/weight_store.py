"""A named actor that stores the location of each published weight version (see `rayk.serving.weights`).

This module does not import torch, so that the actor's process starts four times faster.
"""

import asyncio
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayk.errors import RaykError

NAMESPACE = "rayk"
_DEAD_STORE = "The store of the student's weights has died."
# When rank 0 publishes a version, another worker may still request the previous one, but never an older one: a training
# step requires all workers.
KEPT_VERSIONS = 2


class UnusableWeights(RaykError):
    """A weight version is not available, or its weights differ from the published ones."""


@dataclass(frozen=True)
class WeightVersion:
    """A version of the learner's weights: the attempt, and the number of optimizer steps."""

    attempt: str
    number: int

    def __str__(self) -> str:
        return f"version {self.number}"


@dataclass(frozen=True)
class PublishedWeights:
    """The location of a version's weights, and their checksum."""

    checksum: int
    weights: ray.ObjectRef
    """A dict of `rayk.serving.weights.PackedTensor` by name."""


class WeightStore:
    """Actor that stores the location and checksum of the newest weight versions of the current attempt. The weights
    themselves are in Ray's object store."""

    def __init__(self, wait_seconds: float, kept_versions: int = KEPT_VERSIONS):
        """
        Args:
            wait_seconds: longest time that `find` waits for a version.
            kept_versions: number of newest versions that are kept.
        """
        self._wait_seconds, self._kept_versions = wait_seconds, kept_versions
        self._attempt = ""
        self._ended: set[str] = set()
        self._newest = -1
        self._kept: dict[WeightVersion, PublishedWeights] = {}
        self._changed = asyncio.Condition()

    async def begin(self, attempt: str) -> None:
        """Start an attempt and remove all versions of earlier attempts."""
        async with self._changed:
            self._ended.add(self._attempt)
            self._attempt, self._newest, self._kept = attempt, -1, {}
            self._changed.notify_all()

    async def publish(self, version: WeightVersion, published: PublishedWeights) -> None:
        """Add a version.

        Raises:
            UnusableWeights: the version is not newer than the newest one, or belongs to another attempt.
        """
        async with self._changed:
            if version.attempt != self._attempt or version.number <= self._newest:
                raise UnusableWeights(
                    f"The student's weights of {version} are stale and were not published: version {self._newest} of "
                    "this or a later group of workers exists."
                )
            self._newest = version.number
            self._kept[version] = published
            while len(self._kept) > self._kept_versions:
                del self._kept[next(iter(self._kept))]
            self._changed.notify_all()

    async def find(self, version: WeightVersion) -> PublishedWeights:
        """Wait until `version` is published and return its location.

        Raises:
            UnusableWeights: the version was replaced, or is not published in time.
        """

        def is_decided() -> bool:
            """Return whether the version has been published, or will never be."""
            is_published = version.attempt == self._attempt and version.number <= self._newest
            return is_published or version.attempt in self._ended

        async with self._changed:
            try:
                async with asyncio.timeout(self._wait_seconds):
                    await self._changed.wait_for(is_decided)
            except TimeoutError:
                raise UnusableWeights(
                    f"The student's weights of {version} were not published within {self._wait_seconds:g} s."
                ) from None
            if version not in self._kept:
                raise UnusableWeights(f"The student's weights of {version} are stale: newer ones have replaced them.")
            return self._kept[version]


def start_store(name: str, wait_seconds: float, kept_versions: int = KEPT_VERSIONS) -> ray.actor.ActorHandle:
    """Start the actor on this node. It ends when the returned handle is garbage-collected or this process ends."""
    this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {
        "name": name, "namespace": NAMESPACE, "num_cpus": 0, "scheduling_strategy": this_node,
        "max_concurrency": 1 << 16,  # callers that wait for a version must not block the one that publishes it
    }  # fmt: skip
    return ray.remote(WeightStore).options(**options).remote(wait_seconds, kept_versions)


def get_store(name: str) -> ray.actor.ActorHandle:
    """Return the actor that `start_store` started.

    Raises:
        UnusableWeights: the actor does not exist.
    """
    try:
        return ray.get_actor(name, NAMESPACE)
    except ValueError as error:
        raise UnusableWeights(f"The store of the student's weights ('{name}') does not exist any more.") from error


async def find_weights(store: ray.actor.ActorHandle, version: WeightVersion) -> PublishedWeights:
    """Wait until `version` is published and return its location; errors as `WeightStore.find`."""
    try:
        return await store.find.remote(version)
    except RayTaskError as error:
        raise error.cause from None
    except RayActorError:
        raise UnusableWeights(_DEAD_STORE) from None


def call_store(store: ray.actor.ActorHandle, method: str, *arguments: Any) -> None:
    """Call `begin` or `publish` of the store, and wait.

    Raises:
        UnusableWeights: the store has died, or refuses the version.
    """
    try:
        ray.get(getattr(store, method).remote(*arguments))
    except RayTaskError as error:
        raise error.cause from error
    except RayActorError as error:
        raise UnusableWeights(_DEAD_STORE) from error
