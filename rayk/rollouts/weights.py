"""How a policy's replicas come by the learner's weights: published once a version into Ray's object store, and taken
over by whoever is asked to write under that version.

Nobody tells replicas about new weights: a request names the version it is to be answered under, and a replica that
holds another one asks the `WeightStore`, a small actor with a name, where the weights are. So replicas may die, come
and scale as they like. Versions belong to an attempt, one group of training workers: after a restart the same number of
steps need not have made the same weights.
"""

import asyncio
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor, nn

from rayk.errors import RaykError
from rayk.models import CausalLM

NAMESPACE = "rayk"
# A worker may still be asking for the version before the newest when rank 0 publishes; never for an older one, since
# the step between takes all workers.
_KEPT_VERSIONS = 2


class UnusableWeights(RaykError):
    """Weights of a version that is not to be had, or that are not what was published."""


@dataclass(frozen=True)
class Version:
    """Which weights: of which attempt, after how many optimiser steps."""

    attempt: str
    number: int

    def __str__(self) -> str:
        return f"version {self.number}"


@dataclass(frozen=True)
class Packed:
    """A tensor as plain values and bytes, which Ray shares between processes of a node without copying."""

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray
    """uint8, flat."""


@dataclass(frozen=True)
class Published:
    """Where the weights of a version are, and what they must add up to."""

    checksum: int
    weights: ray.ObjectRef
    """A dict of `Packed` by name."""


def learned(model: CausalLM) -> dict[str, Tensor]:
    """What training changes of `model`, each tensor once: the parameters that require gradients, and kept buffers.

    The rest a replica has from where the learner had it, so of an adapter on a frozen model just the adapter travels.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        if not frozen and not any(tensor is each for each in found.values()):
            found[name] = tensor
    return found


def pack(model: CausalLM) -> dict[str, Packed]:
    """What training changes of `model`; shares its memory where it is on the CPU."""
    packed = {}
    for name, tensor in learned(model).items():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        packed[name] = Packed(str(tensor.dtype), tuple(tensor.shape), flat.view(torch.uint8).numpy())
    return packed


def checksum(weights: Mapping[str, Packed]) -> int:
    """CRC-32 over names, types, shapes and bytes."""
    found = 0
    for name, packed in weights.items():
        found = zlib.crc32(f"{name} {packed.dtype} {packed.shape}".encode(), found)
        found = zlib.crc32(packed.data.data, found)
    return found


@torch.no_grad()
def take_over(model: CausalLM, weights: Mapping[str, Packed], expected: int, version: Version) -> None:
    """Copy `weights` into `model`, after checking that they are whole and its own; else it stays as it was.

    Raises:
        UnusableWeights: they are torn, or another model's.
    """
    if checksum(weights) != expected:
        raise UnusableWeights(f"The student's weights of {version} arrived torn: their checksum is another.")
    own = learned(model)
    same = {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in own.items()} == {
        name: (packed.dtype, packed.shape) for name, packed in weights.items()
    }
    if not same:
        raise UnusableWeights(f"The student's weights of {version} are of another model than the policy's replicas.")
    for name, tensor in own.items():
        packed = weights[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the array is read-only
            flat = torch.from_numpy(packed.data).view(tensor.dtype)
        tensor.copy_(flat.reshape(packed.shape))


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
        self._kept: dict[Version, Published] = {}
        self._changed = asyncio.Condition()

    async def begin(self, attempt: str) -> None:
        """What earlier attempts have published does not exist any more."""
        async with self._changed:
            self._ended.add(self._attempt)
            self._attempt, self._newest, self._kept = attempt, -1, {}
            self._changed.notify_all()

    async def publish(self, version: Version, published: Published) -> None:
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

    async def find(self, version: Version) -> Published:
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
    options = {"name": name, "namespace": NAMESPACE, "num_cpus": 0, "scheduling_strategy": here}
    return ray.remote(WeightStore).options(**options).remote(patience_seconds)


def store_named(name: str) -> ray.actor.ActorHandle:
    """The actor that `start_store` has started.

    Raises:
        UnusableWeights: it is gone.
    """
    try:
        return ray.get_actor(name, NAMESPACE)
    except ValueError as error:
        raise UnusableWeights(f"The store of the student's weights ('{name}') is gone.") from error
