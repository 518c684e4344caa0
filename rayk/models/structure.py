"""Models without weights, and weights for them: how a sharded student is created, saved and copied without a whole copy
on each rank."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rayk.models.shards import whole_tensor


def copy_structure(model: nn.Module) -> nn.Module:
    """Return a copy of `model` whose parameters are on the meta device; tied ones remain tied."""
    empty = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, empty)


def gather_state(model: nn.Module, device: torch.device | str, *, keep: bool) -> dict[str, Tensor]:
    """Return the state dict with whole tensors on `device`, one after the other. A collective if `model` is sharded.

    Args:
        keep: whether this rank needs it; else it only takes part and the dict is empty.
    """
    gathered: dict[int, Tensor] = {}
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in gathered:  # tied tensors have several names
            whole = whole_tensor(tensor.detach())
            gathered[id(tensor)] = whole.to(device) if keep else whole[:0]
        state[name] = gathered[id(tensor)]
    return state if keep else {}


def assign_state(structure: Any, state: Mapping[str, Tensor]) -> None:
    """Make the tensors of `state` the weights of a model without weights; tied ones are tied again."""
    structure.load_state_dict(state, strict=False, assign=True)
    structure.tie_weights()


@torch.no_grad()
def broadcast_module(module: nn.Module, device: torch.device | str, dtypes: Mapping[str, torch.dtype]) -> None:
    """Replace the parameters and buffers of `module` on each rank by rank 0's, on `device`. A collective.

    Parameters that are sharded already remain. On other ranks than 0 parameters may be on the meta device.

    Args:
        dtypes: the type of each parameter and buffer by its name in `module`; without a name it keeps its type.
    """
    replaced: dict[int, Tensor] = {}
    for prefix, owner in module.named_modules():
        for tensors in (owner._parameters, owner._buffers):
            for name, tensor in tensors.items():
                if tensor is None or hasattr(tensor, "full_tensor"):
                    continue
                if id(tensor) not in replaced:
                    dtype = dtypes.get(f"{prefix}.{name}".lstrip("."), tensor.dtype)
                    whole = _broadcast(tensor, device, dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    replaced[id(tensor)] = nn.Parameter(whole, tensor.requires_grad) if is_parameter else whole
                tensors[name] = replaced[id(tensor)]


def _broadcast(tensor: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    if torch.distributed.get_rank() == 0:
        whole = tensor.detach().to(device, dtype).contiguous()
    else:
        whole = torch.empty(tensor.shape, dtype=dtype, device=device)
    torch.distributed.broadcast(whole, 0)
    return whole
