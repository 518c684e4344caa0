"""Types of models and their tensors."""

from typing import Any

import torch

CausalLM = Any
"""A transformers causal language model (transformers' classes have no usable type annotations)."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
