"""Who knows where the learner's weights of each version are (see `rayk.serving.weights`): an actor with a name.

A room of its own, without torch: its process is up in a quarter of the time.
"""

import asyncio
from dataclasses import dataclass

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayk.errors import RaykError

NAMESPACE = "rayk"
# A worker may still be asking for the version before the newest when rank 0 publishes; never for an older one, since
# the step between takes all workers.
_KEPT_VERSIONS = 2


class UnusableWeights(RaykError):
    """Weights of a version that is not to be had, or that are not what was published."""


@dataclass(frozen=True)
class WeightVersion:
    """Which weights: of which attempt, after how many optimiser steps."""

    attempt: str
    number: int

    def __str__(self) -> str:
        return f"version {self.number}"


@dataclass(frozen=True)
class PublishedWeights:
    """Where the weights of a version are, and what they must add up to."""

    checksum: int
    weights: ray.ObjectRef
    """A dict of `rayk.serving.weights.PackedTensor` by name."""


class WeightStore:
    """Knows where the weights are that may still be asked for: the newest versions of the present attempt. An actor;
    the weights themselves stay in the object store."""

    def __init__(self, patience_seconds: float):
        """
        Args:
            patience_seconds: how long a version that has yet to be published is waited for.
        """
        self._patience_seconds = patience_seconds
        self._attempt = ""
        self._ended: set[str] = set()
        self._newest = -1
        self._kept: dict[WeightVersion, PublishedWeights] = {}
        self._changed = asyncio.Condition()

    async def begin(self, attempt: str) -> None:
        """What earlier attempts have published does not exist any more."""
        async with self._changed:
            self._ended.add(self._attempt)
            self._attempt, self._newest, self._kept = attempt, -1, {}
            self._changed.notify_all()

    async def publish(self, version: WeightVersion, published: PublishedWeights) -> None:
        """Make a version known.

        Raises:
            UnusableWeights: it is not newer than what there is.
        """
        async with self._changed:
            if version.attempt != self._attempt or version.number <= self._newest:
                raise UnusableWeights(
                    f"The student's weights of {version} are stale and were not published: version {self._newest} of "
                    "this or a later group of workers is there."
                )
            self._newest = version.number
            self._kept[version] = published
            while len(self._kept) > _KEPT_VERSIONS:
                del self._kept[next(iter(self._kept))]
            self._changed.notify_all()

    async def find(self, version: WeightVersion) -> PublishedWeights:
        """Where the weights of `version` are, once they are published.

        Raises:
            UnusableWeights: they are gone, or do not come.
        """

        def decided() -> bool:
            known = version.attempt == self._attempt and version.number <= self._newest
            return known or version.attempt in self._ended

        async with self._changed:
            try:
                async with asyncio.timeout(self._patience_seconds):
                    await self._changed.wait_for(decided)
            except TimeoutError:
                raise UnusableWeights(
                    f"The student's weights of {version} were not published within {self._patience_seconds:g} s."
                ) from None
            if version not in self._kept:
                raise UnusableWeights(f"The student's weights of {version} are stale: newer ones have replaced them.")
            return self._kept[version]


def start_store(name: str, patience_seconds: float) -> ray.actor.ActorHandle:
    """The actor, on this node; it ends with the handle that is returned, or with this process."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {
        "name": name, "namespace": NAMESPACE, "num_cpus": 0, "scheduling_strategy": here,
        "max_concurrency": 1 << 16,  # those who wait for a version must not keep out the one who publishes it
    }  # fmt: skip
    return ray.remote(WeightStore).options(**options).remote(patience_seconds)


def get_store(name: str) -> ray.actor.ActorHandle:
    """The actor that `start_store` has started.

    Raises:
        UnusableWeights: it is gone.
    """
    try:
        return ray.get_actor(name, NAMESPACE)
    except ValueError as error:
        raise UnusableWeights(f"The store of the student's weights ('{name}') is gone.") from error
