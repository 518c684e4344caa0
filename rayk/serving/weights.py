"""Transfer a learner's weights to replicas: published once per version in Ray's object store, loaded on demand.

Replicas are not notified of new weights. A request names its weight version, and a replica with another version gets
the location of the weights from a named actor (`rayk.serving.weight_store`), so replicas may die, start and scale at
any time. A version belongs to an attempt (one group of training workers): after a restart, the same number of steps may
have produced other weights.
"""

import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from rayk.models import CausalLM
from rayk.serving.weight_store import UnusableWeights, WeightVersion


@dataclass(frozen=True)
class PackedTensor:
    """A tensor as plain values and bytes, which the processes of a node share through Ray without a copy."""

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray
    """uint8, flat."""


def trainable_state_dict(model: CausalLM) -> dict[str, Tensor]:
    """Return the parameters that require gradients and the persistent buffers of `model`, each tensor once.

    Replicas load all other tensors from the same folder as the learner, so of an adapter on a frozen model only the
    adapter is transferred.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        if not frozen and not any(tensor is other for other in state.values()):
            state[name] = tensor
    return state


def pack_weights(model: CausalLM) -> dict[str, PackedTensor]:
    """Return `trainable_state_dict(model)` as packed tensors; they share the model's memory on a CPU."""
    packed = {}
    for name, tensor in trainable_state_dict(model).items():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        packed[name] = PackedTensor(str(tensor.dtype), tuple(tensor.shape), flat.view(torch.uint8).numpy())
    return packed


def checksum(weights: Mapping[str, PackedTensor]) -> int:
    """Return the CRC-32 over names, dtypes, shapes and bytes."""
    crc = 0
    for name, packed in weights.items():
        crc = zlib.crc32(f"{name} {packed.dtype} {packed.shape}".encode(), crc)
        crc = zlib.crc32(packed.data.data, crc)
    return crc


@torch.no_grad()
def load_weights(
    model: CausalLM, weights: Mapping[str, PackedTensor], expected_checksum: int, version: WeightVersion
) -> None:
    """Copy `weights` into `model`; on an error the model is unchanged.

    Raises:
        UnusableWeights: the weights are damaged, or belong to another model.
    """
    if checksum(weights) != expected_checksum:
        raise UnusableWeights(f"The student's weights of {version} were damaged on the way: the checksum differs.")
    state = trainable_state_dict(model)
    same = {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in state.items()} == {
        name: (packed.dtype, packed.shape) for name, packed in weights.items()
    }
    if not same:
        raise UnusableWeights(f"The student's weights of {version} belong to another model than the replica's.")
    for name, tensor in state.items():
        packed = weights[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the array is read-only
            flat = torch.from_numpy(packed.data).view(tensor.dtype)
        tensor.copy_(flat.reshape(packed.shape))
