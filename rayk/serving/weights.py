"""How a policy's replicas come by the learner's weights: published once a version into Ray's object store, and taken
over by whoever is asked to write under that version.

Nobody tells replicas about new weights: a request names the version it is to be answered under, and a replica that
holds another one asks the store, a small actor with a name (`rayk.serving.weight_store`), where the weights are. So
replicas may die, come and scale as they like. Versions belong to an attempt, one group of training workers: after a restart the
same number of steps need not have made the same weights.
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
    """A tensor as plain values and bytes, which Ray shares between processes of a node without copying."""

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray
    """uint8, flat."""


def trainable_state_dict(model: CausalLM) -> dict[str, Tensor]:
    """What training changes of `model`, each tensor once: the parameters that require gradients, and kept buffers.

    The rest a replica has from where the learner had it, so of an adapter on a frozen model just the adapter travels.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        if not frozen and not any(tensor is each for each in found.values()):
            found[name] = tensor
    return found


def pack_weights(model: CausalLM) -> dict[str, PackedTensor]:
    """What training changes of `model`; shares its memory where it is on the CPU."""
    packed = {}
    for name, tensor in trainable_state_dict(model).items():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        packed[name] = PackedTensor(str(tensor.dtype), tuple(tensor.shape), flat.view(torch.uint8).numpy())
    return packed


def checksum(weights: Mapping[str, PackedTensor]) -> int:
    """CRC-32 over names, types, shapes and bytes."""
    found = 0
    for name, packed in weights.items():
        found = zlib.crc32(f"{name} {packed.dtype} {packed.shape}".encode(), found)
        found = zlib.crc32(packed.data.data, found)
    return found


@torch.no_grad()
def load_weights(model: CausalLM, weights: Mapping[str, PackedTensor], expected: int, version: WeightVersion) -> None:
    """Copy `weights` into `model`, after checking that they are whole and its own; else it stays as it was.

    Raises:
        UnusableWeights: they are torn, or another model's.
    """
    if checksum(weights) != expected:
        raise UnusableWeights(f"The student's weights of {version} arrived torn: their checksum is another.")
    own = trainable_state_dict(model)
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
