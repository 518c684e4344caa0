"""Rows that were written for steps still to come, as a checkpoint keeps them: the weights that wrote them are gone."""

from typing import Any

import numpy as np
import torch

from rayk.data.examples import Example
from rayk.rollouts.policy import Rollout
from rayk.signals.sequence import TokenSequence

_OF_THE_DATA = ("where", "fields", "rejected", "contexts")


def pack_row(row: TokenSequence) -> dict[str, Any]:
    """`row` as tensors and plain values, without what the data's own row says."""
    values = {
        name: torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value
        for name, value in vars(row).items()
        if name not in _OF_THE_DATA
    }
    return values | {"sampled": isinstance(row, Rollout)}


def unpack_row(packed: dict[str, Any], origin: Example) -> Example:
    """What `pack_row` made, `origin` being the data's row it was written for."""
    values: dict[str, Any] = {
        name: value.numpy() if isinstance(value, torch.Tensor) else value
        for name, value in packed.items()
        if name != "sampled"
    }
    kind = Rollout if packed["sampled"] else Example
    return kind(**values, where=origin.where, fields=origin.fields)
