"""Pack rows for a checkpoint.

A checkpoint contains the rollouts that were generated in advance for later steps, because the weights that generated
them do not exist any more after a restart.
"""

from typing import Any

import numpy as np
import torch

from rayk.data.examples import Example
from rayk.rollouts.policy import Rollout
from rayk.signals.sequence import TokenSequence

_NOT_PACKED = ("where", "fields", "rejected", "contexts", "aligned")


def pack_row(row: TokenSequence) -> dict[str, Any]:
    """Return `row` as tensors and plain values, without those that the dataset's row contains (`_NOT_PACKED`)."""
    values = {
        name: torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value
        for name, value in vars(row).items()
        if name not in _NOT_PACKED
    }
    return values | {"sampled": isinstance(row, Rollout)}


def unpack_row(packed: dict[str, Any], origin: Example) -> Example:
    """Restore the row from the result of `pack_row`.

    Args:
        origin: the dataset's row, from which the values in `where` and `fields` are taken.
    """
    values: dict[str, Any] = {
        name: value.numpy() if isinstance(value, torch.Tensor) else value
        for name, value in packed.items()
        if name != "sampled"
    }
    row_class = Rollout if packed["sampled"] else Example
    return row_class(**values, where=origin.where, fields=origin.fields)
