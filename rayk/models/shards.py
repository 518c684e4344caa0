"""Whole tensors from the parts of sharded ones."""

from typing import Any

from torch import Tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return the tensor itself, or the whole of a sharded one (`DTensor`), for which all ranks must call this."""
    # By its method, because the import of torch.distributed.tensor takes a while.
    gather: Any = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()
