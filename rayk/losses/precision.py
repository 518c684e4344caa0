"""Precision of loss computations: float32, or float64 for float64 inputs."""

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, and float32 for every other dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def upcast(values: Tensor) -> Tensor:
    """Return `values` in at least float32."""
    return values.to(compute_dtype(values.dtype))
