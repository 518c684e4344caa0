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
from rayk.models.shards import whole_tensor
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


def pack_weights(model: CausalLM, dtype: torch.dtype | None = None, *, keep: bool = True) -> dict[str, PackedTensor]:
    """Return `trainable_state_dict(model)` as packed tensors; see `pack_tensors`."""
    return pack_tensors(trainable_state_dict(model), dtype, keep=keep)


def pack_tensors(
    state: Mapping[str, Tensor], dtype: torch.dtype | None = None, *, keep: bool = True
) -> dict[str, PackedTensor]:
    """Return the tensors of `state` as packed tensors; they share the memory of tensors on a CPU.

    If the tensors are sharded, all ranks must call this; each tensor is gathered after the other.

    Args:
        dtype: type in which the replicas compute, to which floating-point tensors are rounded; None: their own.
        keep: whether this rank needs the tensors; else it only takes part in gathering them.
    """
    packed = {}
    for name, tensor in state.items():
        whole = whole_tensor(tensor.detach())
        if not keep:
            continue
        sent = whole.to(dtype if dtype is not None and whole.is_floating_point() else whole.dtype)
        flat = sent.cpu().contiguous().reshape(-1)
        packed[name] = PackedTensor(str(sent.dtype), tuple(sent.shape), flat.view(torch.uint8).numpy())
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
    """Copy `weights` into `model`, whose floating-point type may be another one; on an error the model is unchanged.

    Raises:
        UnusableWeights: the weights are damaged, or belong to another model.
    """
    if checksum(weights) != expected_checksum:
        raise UnusableWeights(f"The student's weights of {version} were damaged on the way: the checksum differs.")
    state = trainable_state_dict(model)
    same = {name: (tensor.is_floating_point(), tuple(tensor.shape)) for name, tensor in state.items()} == {
        name: (_dtype_of(packed).is_floating_point, packed.shape) for name, packed in weights.items()
    }
    if not same:
        raise UnusableWeights(f"The student's weights of {version} belong to another model than the replica's.")
    for name, tensor in state.items():
        packed = weights[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the array is read-only
            flat = torch.from_numpy(packed.data).view(_dtype_of(packed))
        tensor.copy_(flat.reshape(packed.shape))


def _dtype_of(packed: PackedTensor) -> torch.dtype:
    return getattr(torch, packed.dtype.removeprefix("torch."))
