"""Shard the student over the workers (FSDP2): each rank stores a part of every weight, its gradient and its optimizer
state, and the ranks gather a block's whole weights when they compute it.

The blocks are the modules that transformers does not split (`_no_split_modules`: the layers). `LossModule` is the root:
its own weights are all others (embedding, final norm, head, a method's modules), and they are gathered before its
forward pass. So the losses use the head as a plain tensor.

Every rank must run the same collectives in the same order, although its micro-batches differ:

- With `reshard: last` the ranks gather all weights in the first forward pass of an update and keep them until the
  backward pass of its last micro-batch, which alone reduces the gradients.
- With `reshard: always` each pass gathers and frees each block, and reduces its gradient. `Learner` gives all ranks the
  same number of micro-batches.
- Evaluations, rollouts and other passes outside an update run between `gather` and `release`, without collectives.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from rayk.config import TrainingConfig
from rayk.errors import InputError
from rayk.methods import Experience
from rayk.models import DTYPES
from rayk.models.body import long_rope_start
from rayk.models.packing import adopt_attention
from rayk.models.structure import assign_state, broadcast_module, copy_structure, gather_state
from rayk.training.ranks import Ranks
from rayk.training.student import LossModule


def find_blocks(model: Any) -> list[nn.Module]:
    """Return the modules of a transformers model whose weights are gathered together, in the order of its layers.

    Raises:
        InputError: the model names no blocks; its blocks share weights with each other or with the rest; or it computes
            short and long rows apart, so that ranks would need different numbers of forward passes.
    """
    if long_rope_start(model.config) is not None:
        raise InputError(
            f"training.sharding does not work with the 'longrope' rotary embeddings of {type(model).__name__}; set it "
            "to none."
        )
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if type(module).__name__ in names and not any(name.startswith(f"{outer}.") for outer in blocks):
            blocks[name] = module
    if not blocks:
        raise InputError(
            f"training.sharding needs the blocks of the student, but transformers names none for "
            f"{type(model).__name__} (_no_split_modules); set it to none."
        )
    owners: dict[Tensor, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = next((block for block in blocks if name.startswith(f"{block}.")), "the rest")
        if owners.setdefault(parameter, owner) != owner:
            raise InputError(
                f"training.sharding cannot shard {type(model).__name__}, whose parts '{owners[parameter]}' and "
                f"'{owner}' share weights; set it to none."
            )
    return list(blocks.values())


def make_mesh(settings: TrainingConfig, ranks: Ranks, device: str) -> DeviceMesh:
    """Arrange the workers: [shards] for `fsdp`, [copies, shards] for `hsdp`. A collective.

    Raises:
        InputError: the workers cannot be divided into groups of `training.shards`, or of a node's workers.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():  # one worker needs no group otherwise
        backend = "nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if settings.sharding == "fsdp":
        return init_device_mesh(kind, (ranks.world,), mesh_dim_names=("shards",))
    shards = settings.shards or ranks.local_world
    if len(set(ranks.gather(shards))) > 1 or ranks.world % shards:
        raise InputError(
            f"training.sharding is hsdp, but {ranks.world} workers cannot be divided into groups of "
            f"{shards} (the workers of this node); set training.shards to a divisor of training.workers."
        )
    return init_device_mesh(kind, (ranks.world // shards, shards), mesh_dim_names=("copies", "shards"))


class ShardedModule:
    """A sharded `LossModule`: its forward pass, and what its weights need around that. All ranks must call each method
    at the same point.

    Args:
        module: the student and the method's modules. Rank 0 has their weights, and sends them part by part to the
            others, whose parameters need no memory before that.
        device: this rank's device.
    """

    def __init__(self, module: LossModule, settings: TrainingConfig, ranks: Ranks, device: str):
        self.equalizes = settings.reshard == "always"
        """Whether all ranks need the same number of micro-batches."""
        self._ranks = ranks
        self._module: Any = module
        self._blocks: list[Any] = [*find_blocks(module.student.model)]
        mesh = make_mesh(settings, ranks, device)
        _check_shards(self._blocks, mesh.size(mesh.ndim - 1))
        dtypes = _agree_on_structure(module, ranks)
        self._structure = copy_structure(module.student.model)
        names = {block: name for name, block in module.named_modules()}
        dtype = None if settings.precision == "float32" else DTYPES[settings.precision]
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for block in self._blocks:
            broadcast_module(block, device, _below(dtypes, f"{names[block]}."))
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=self.equalizes)
        broadcast_module(module, device, dtypes)
        # The root's input is an experience, whose log-probs must keep their type.
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        self._set_prefetching()
        self._parts: list[Any] = [self._module, *self._blocks]
        with torch.no_grad():
            self._module(None)  # lets FSDP2 find its root, which it requires before a block is computed
        self.release()
        reduce_unused = getattr(module, "set_reduce_scatter_unused_params", None)  # torch 2.13
        if reduce_unused is not None:
            reduce_unused(True)  # no token of this rank may have used an expert

    def __call__(self, experience: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        return self._module(experience)

    def start(self) -> None:
        """Do nothing: the weights are sharded from the start."""

    def gather(self) -> None:
        """Gather all weights on every rank, for passes without communication."""
        for part in self._parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()

    def release(self) -> None:
        """Free the weights of other ranks."""
        for part in self._parts:
            part.reshard()
        for block in self._blocks:
            block.set_reshard_after_forward(self.equalizes, recurse=False)

    def whole_model(self, *, keep: bool) -> nn.Module | None:
        """Return a copy of the student's model with all weights, on the CPU; None if this rank need not `keep` it. A
        collective."""
        state = gather_state(self._module.student.model, "cpu", keep=keep)
        if not keep:
            return None
        whole = copy.deepcopy(self._structure)
        assign_state(whole, state)
        return whole

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Keep all weights on every rank, so that ranks may compute different numbers of forward passes."""
        self.gather()
        try:
            yield
        finally:
            self.release()

    @contextmanager
    def micro_batch(self, is_last: bool) -> Iterator[None]:
        """Prepare the passes of a micro-batch; the last one of an update reduces the gradients of all of them, or with
        `reshard: always` each its own."""
        reduces = is_last or self.equalizes
        self._module.set_requires_gradient_sync(reduces)
        self._module.set_reshard_after_backward(reduces)
        yield

    def drop_unused_gradients(self) -> None:
        """Remove the gradients of weights that this stage of the method does not train. FSDP2 sets them to 0, with
        which the optimizer would still apply weight decay and momentum. A collective."""
        if not self._module.trains_in_stages:
            return
        trained = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        nothing = torch.zeros((), dtype=torch.bool, device=trained[0].device)
        is_used = [nothing if each.grad is None else each.grad.to_local().any() for each in trained]
        for parameter, ranks in zip(trained, self._ranks.sums(torch.stack(is_used).float().tolist()), strict=True):
            if not ranks:
                parameter.grad = None

    def _set_prefetching(self) -> None:
        """Let each backward pass gather the block before it. FSDP2's own order is that of all earlier forward passes,
        evaluations included, whose number differs between ranks."""
        self._module.set_modules_to_backward_prefetch([self._blocks[-1]])
        for earlier, block in zip([self._blocks[0], *self._blocks], self._blocks, strict=False):
            block.set_modules_to_backward_prefetch([earlier])


def _agree_on_structure(module: LossModule, ranks: Ranks) -> dict[str, torch.dtype]:
    """Check that all ranks have parameters of the same names and shapes, and let all use rank 0's attention and
    generation settings. A collective.

    Returns:
        The type of each parameter and buffer: float32 if it is trained, else that of rank 0.
    """
    model: Any = module.student.model
    tensors = [*module.named_parameters(), *module.named_buffers()]  # tied ones by one of their names
    own = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors}
    chosen: list[Any] = [(own, model.config._attn_implementation, model.generation_config)]
    dist.broadcast_object_list(chosen, 0)
    first, attention, generation_config = chosen[0]
    different = [name for name in own.keys() | first.keys() if own.get(name, [0])[0] != first.get(name, [0])[0]]
    ranks.agree(
        InputError(
            f"The weights of {type(model).__name__} differ from what its configuration describes, in "
            f"'{min(different)}', so it cannot be sharded; set training.sharding to none."
        )
        if different
        else None
    )
    adopt_attention(model, attention)
    model.generation_config = generation_config
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    return {name: torch.float32 if name in trained else dtype for name, (_, dtype) in first.items()}


def _below(values: Mapping[str, torch.dtype], prefix: str) -> dict[str, torch.dtype]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def _check_shards(blocks: list[nn.Module], shards: int) -> None:
    """Check that each rank gets a part of each block's largest weight, which is divided along its first dimension."""
    rows = min(max(parameter.shape[0] for parameter in block.parameters()) for block in blocks)
    if shards > rows:
        raise InputError(
            f"training.sharding divides the weights among {shards} workers, but a block's largest weight has only "
            f"{rows} rows; use at most {rows} workers, or hsdp with training.shards."
        )
