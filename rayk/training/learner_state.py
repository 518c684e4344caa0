"""The learner's weights and optimizer state as named tensors, each rank's part of them, and their way back.

Names are those of `torch.distributed.checkpoint.state_dict`, so that they depend on neither sharding nor the number of
workers. Its planners decide which rank writes which part (of a tensor that several ranks hold, one of them), and which
stored parts a rank reads. Only the files differ from torch's, whose metadata is a pickle and whose writers copy the
state several times.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.tensor import DTensor

from rayk.errors import RaykError
from rayk.storage.tensor_files import DamagedFile, TensorFile
from rayk.training.checkpoint import CheckpointStore, Manifest

_MODEL, _OPTIMIZER = "model.", "optimizer.state."
_STUDENT = f"{_MODEL}student.model."
_SHARDING_INFO, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
"""Keys under which torch's `HuggingFaceStorageWriter` stores the place of a part in its tensor; its reader reads the
files of `ShardFiles` too."""


def trained_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that are trained and the persistent buffers, tied ones once. They share memory with the
    module, and are DTensors where the module is sharded."""
    state: dict[str, Any] = get_model_state_dict(module, options=StateDictOptions(ignore_frozen_params=True))
    names = {name for name, _ in module.named_parameters()}
    aliases = {name for name, _ in module.named_parameters(remove_duplicate=False)} - names
    return {f"{_MODEL}{name}": tensor for name, tensor in state.items() if name not in aliases}


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the tensors of the optimizer's state, and its numbers. Settings such as the learning rate are no part of
    them: they follow from the run's settings and the step."""
    if not optimizer.state:
        return {}, {}
    options = StateDictOptions(flatten_optimizer_state_dict=True, ignore_frozen_params=True)
    state: dict[str, Any] = get_optimizer_state_dict(module, optimizer, options=options)
    parts = {f"optimizer.{name}": value for name, value in state.items() if name.startswith("state.")}
    tensors = {name: value for name, value in parts.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in parts.items() if name not in tensors}


@dataclass
class StatePart:
    """The part of a state that one rank writes: copies on the CPU, with their places in the whole tensors."""

    tensors: list[tuple[str, Tensor]]
    metadata: dict[str, str]


def copy_part(state: Mapping[str, Tensor], rank: int, gather: Callable[[SavePlan], list[SavePlan]]) -> StatePart:
    """Copy this rank's part of `state`, which all ranks together hold. A collective.

    Args:
        gather: returns the value of every rank, on every rank.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(dict(state), is_coordinator=rank == 0)
    # Every rank computes the same plan for all, so that none needs to be sent back.
    plans, _ = planner.create_global_plan(gather(planner.create_local_plan()))
    tensors, offsets = [], {}
    for item in planner.finish_plan(plans[rank]).items:
        data = planner.resolve_data(item)
        assert isinstance(data, Tensor)
        tensors.append((item.index.fqn, data.detach().to("cpu", copy=True).contiguous()))
        offsets[item.index.fqn] = {_OFFSETS: list(item.index.offset or [0] * data.ndim)}
    return StatePart(tensors, {"format": "pt", "DCP_VERSION": "1.0", _SHARDING_INFO: json.dumps(offsets)})


class StateSource(Protocol):
    """A stored state."""

    metadata: Metadata
    """The names, types and shapes of its tensors, and the parts in which they are stored."""

    def read_into(self, index: MetadataIndex, offsets: Sequence[int], target: Tensor) -> None:
        """Read what starts at `offsets` of a stored part and has the shape of `target`."""


class ShardFiles:
    """The state in the files that the ranks have written.

    Raises:
        DamagedFile: a file does not contain a rank's part.
    """

    def __init__(self, files: Sequence[TensorFile]):
        self._places: dict[MetadataIndex, tuple[TensorFile, str]] = {}
        parts: dict[str, list[ChunkStorageMetadata]] = {}
        dtypes: dict[str, torch.dtype] = {}
        for file in files:
            for name, offsets in _offsets(file).items():
                stored = file.tensors[name]
                dtypes[name] = stored.dtype
                parts.setdefault(name, []).append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(stored.shape)))
                self._places[MetadataIndex(name, offsets)] = file, name
        self.metadata = Metadata({name: _stored_tensor(found, dtypes[name]) for name, found in parts.items()})

    def read_into(self, index: MetadataIndex, offsets: Sequence[int], target: Tensor) -> None:
        file, name = self._places[index]
        file.read_into(name, target, offsets)


def open_shards(store: CheckpointStore, manifest: Manifest, stack: ExitStack) -> ShardFiles:
    """Return the learner's state in a checkpoint; its files are open until `stack` is closed.

    Raises:
        DamagedFile: a file does not contain a rank's part.
    """
    return ShardFiles([stack.enter_context(store.open_file(manifest, name)) for name in manifest.named(".shard-")])


class WholeTensors:
    """A state whose tensors are whole and in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors
        self.metadata = Metadata(
            {
                name: _stored_tensor([ChunkStorageMetadata(torch.Size([0] * t.ndim), t.shape)], t.dtype)
                for name, t in tensors.items()
            }
        )

    def read_into(self, index: MetadataIndex, offsets: Sequence[int], target: Tensor) -> None:
        part = self._tensors[index.fqn]
        for dimension, (offset, width) in enumerate(zip(offsets, target.shape, strict=True)):
            part = part.narrow(dimension, offset, width)
        target.copy_(part)


def load_weights(module: nn.Module, source: StateSource, *, without: str | None = None) -> None:
    """Read the trained weights into `module`, each rank its own part.

    Args:
        without: a module that `module` need not have although its weights are stored.

    Raises:
        RaykError: they belong to another module.
    """
    weights = trained_weights(module)
    stored = {name for name in source.metadata.state_dict_metadata if name.startswith(_MODEL)}
    if without is not None:
        stored = {name for name in stored if not name.startswith(f"{_MODEL}{without}.")}
    if stored != weights.keys():
        raise RaykError(_difference(stored, weights.keys()))
    _load(weights, source)


def read_student(source: StateSource) -> dict[str, Tensor]:
    """Return the student's trained weights and buffers, whole and on the CPU, by their names in its model."""
    stored = source.metadata.state_dict_metadata
    weights = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if name.startswith(_STUDENT) and isinstance(entry, TensorStorageMetadata)
    }
    _load(weights, source)
    return {name.removeprefix(_STUDENT): tensor for name, tensor in weights.items()}


def load_tensors(tensors: dict[str, Tensor], source: StateSource) -> None:
    """Read tensors other than weights and optimizer state into `tensors`, each rank its own part.

    Raises:
        RaykError: one is not stored, or has another shape.
    """
    if lacking := tensors.keys() - source.metadata.state_dict_metadata.keys():
        raise RaykError(f"it lacks '{min(lacking)}'")
    _load(tensors, source)


def load_optimizer(
    module: nn.Module, optimizer: torch.optim.Optimizer, source: StateSource, numbers: Mapping[str, float]
) -> None:
    """Read the optimizer's state, each rank its own part.

    torch's `set_optimizer_state_dict` first makes a step with zero gradients to create the state, which takes twice the
    memory of the weights. Here the tensors are created as the stored ones describe them.

    Raises:
        RaykError: it belongs to another module or optimizer.
    """
    parts: dict[str, dict[str, Any]] = {}
    for key in [*source.metadata.state_dict_metadata, *numbers]:
        if key.startswith(_OPTIMIZER):
            owner, _, part = key.removeprefix(_OPTIMIZER).rpartition(".")
            parts.setdefault(owner, {})[part] = numbers.get(key)
    parameters = dict(module.named_parameters())
    if unknown := parts.keys() - parameters.keys():
        raise RaykError(f"it contains optimizer state of '{min(unknown)}', which this student lacks")
    tensors: dict[str, Tensor] = {}
    for owner, state in parts.items():
        for part in state:
            key = f"{_OPTIMIZER}{owner}.{part}"
            stored = source.metadata.state_dict_metadata.get(key)
            if isinstance(stored, TensorStorageMetadata):
                state[part] = tensors[key] = _empty(stored, parameters[owner])
    _load(tensors, source)
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = {parameter: name for name, parameter in parameters.items()}
    states = {number: parts[names[p]] for number, p in enumerate(order) if names[p] in parts}
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _load(state: dict[str, Tensor], source: StateSource) -> None:
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    planner.set_up_planner(state, source.metadata)
    try:
        plan = planner.create_local_plan()
    except ValueError as error:  # another shape
        raise RaykError(str(error).splitlines()[0]) from error
    for item in plan.items:
        target = planner.resolve_tensor(item).detach()
        source.read_into(item.storage_index, item.storage_offsets, target)


def _empty(stored: TensorStorageMetadata, parameter: Tensor) -> Tensor:
    """Return a tensor for a stored one of a parameter's optimizer state, sharded as the parameter if it has its
    shape."""
    if stored.size == parameter.shape:
        return torch.empty_like(parameter.detach(), dtype=stored.properties.dtype)
    device = parameter.to_local().device if isinstance(parameter, DTensor) else parameter.device
    return torch.empty(stored.size, dtype=stored.properties.dtype, device=device if stored.size else "cpu")


def _stored_tensor(parts: list[ChunkStorageMetadata], dtype: torch.dtype) -> TensorStorageMetadata:
    ends = [[offset + width for offset, width in zip(part.offsets, part.sizes, strict=True)] for part in parts]
    size = torch.Size([max(widths) for widths in zip(*ends, strict=True)])
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, parts)


def _offsets(file: TensorFile) -> dict[str, list[int]]:
    try:
        offsets = {
            str(name): [int(offset) for offset in entry[_OFFSETS]]
            for name, entry in json.loads(file.metadata[_SHARDING_INFO]).items()
        }
        fits = all(len(offsets[name]) == len(stored.shape) for name, stored in file.tensors.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFile("it does not say where its tensors belong") from error
    if (
        not fits
        or offsets.keys() != file.tensors.keys()
        or min((min(o, default=0) for o in offsets.values()), default=0) < 0
    ):
        raise DamagedFile("the places of its tensors are wrong")
    return offsets


def _difference(stored: Any, expected: Any) -> str:
    if lacking := expected - stored:
        return f"it lacks '{min(lacking).removeprefix(_MODEL)}'"
    return f"it contains '{min(stored - expected).removeprefix(_MODEL)}', which this student lacks"
