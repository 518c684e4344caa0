"""Data-parallel training with all weights on each rank (DDP)."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rayk.methods import Experience
from rayk.training.student import LossModule

# Buffers are constants of the architecture, so no pass need send them. Newer versions of torch renamed the argument.
_SYNCHRONIZE_BUFFERS = "forward_sync_buffers"
if _SYNCHRONIZE_BUFFERS not in signature(DistributedDataParallel.__init__).parameters:
    _SYNCHRONIZE_BUFFERS = "broadcast_buffers"


class ReplicatedModule:
    """A `LossModule` of which each rank has all weights; see `rayk.training.sharding.ShardedModule`."""

    equalizes: ClassVar[bool] = False

    def __init__(self, module: LossModule):
        self._module: Any = module
        self._student = module.student
        self._trains_in_stages = module.trains_in_stages

    def __call__(self, experience: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        return self._module(experience)

    def start(self) -> None:
        """Wrap the module for DDP if there is more than one worker. A collective."""
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            options: dict[str, Any] = {"gradient_as_bucket_view": True, _SYNCHRONIZE_BUFFERS: False}
            options["find_unused_parameters"] = self._trains_in_stages
            self._module = DistributedDataParallel(self._module, **options)

    def gather(self) -> None:
        """Do nothing: each rank has all weights."""

    def release(self) -> None:
        """Do nothing: each rank keeps all weights."""

    def whole_model(self, *, keep: bool) -> nn.Module | None:
        """Return the student's model; None if this rank need not `keep` it."""
        return self._student.model if keep else None

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Do nothing: each rank has all weights."""
        yield

    @contextmanager
    def micro_batch(self, is_last: bool) -> Iterator[None]:
        """Prepare the passes of a micro-batch; the last one of an update reduces the gradients of all of them."""
        is_wrapped = isinstance(self._module, DistributedDataParallel)
        with self._module.no_sync() if is_wrapped and not is_last else nullcontext():
            yield

    def drop_unused_gradients(self) -> None:
        """Do nothing: weights that no loss of the update uses have no gradient."""
