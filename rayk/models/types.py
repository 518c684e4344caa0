"""The types that models are made of."""

from typing import Any

import torch

CausalLM = Any
"""A transformers causal language model (transformers' classes carry no types to check against)."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
