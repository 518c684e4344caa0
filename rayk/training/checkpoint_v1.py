"""Read checkpoints in the format of rayk 0.1: whole tensors in files that rank 0 wrote. To be removed in rayk 0.3.

torch's weights-only reader reads the parts that were written with `torch.save`; it executes no code from a file.
"""

import io
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from torch import nn

from rayk.training.checkpoint import CheckpointStore, Manifest
from rayk.training.learner_state import WholeTensors


def read_state(
    store: CheckpointStore, manifest: Manifest, module: nn.Module, optimizer: torch.optim.Optimizer
) -> WholeTensors:
    """Return weights and optimizer state, whose parameters are numbered in the optimizer's order."""
    tensors = {f"model.{name}": tensor for name, tensor in read_weights(store, manifest).items()}
    states = _unpack(store.read_bytes(manifest, "optimizer.pt")).get("state", {})
    names = {parameter: name for name, parameter in module.named_parameters()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    for number, state in states.items():
        tensors |= {f"optimizer.state.{order[number]}.{part}": value for part, value in state.items()}
    return WholeTensors(tensors)


def read_weights(store: CheckpointStore, manifest: Manifest) -> dict[str, torch.Tensor]:
    """Return the trained weights by the module's own names."""
    return load_tensors(store.read_bytes(manifest, "model.safetensors"))


def read_values(store: CheckpointStore, manifest: Manifest) -> tuple[list[Any], list[Any]]:
    """Return the method's states, one per worker, and the rows generated ahead."""
    return _unpack(store.read_bytes(manifest, "method.pt")), _unpack(store.read_bytes(manifest, "rollouts.pt"))


def _unpack(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
