"""Size of a causal language model by its configuration alone: parameters, bytes of weights, operations per token."""

from dataclasses import dataclass
from typing import Any

import torch

from rayk.models.loading import load_model_config
from rayk.models.text_model import causal_config

_QUANTIZED_BYTES = {"fp8": 1.0, "fbgemm_fp8": 1.0, "awq": 0.5, "gptq": 0.5, "mxfp4": 0.53}
"""Bytes per weight by the method in `quantization_config`."""


@dataclass(frozen=True)
class ModelSize:
    """The size of a model.

    Attributes:
        parameters: all parameters.
        active: those that one token uses: all but the experts that are not chosen.
        embedding: those of the input embedding, which a token looks up without a product.
        weight_bytes: bytes of the weights in the checkpoint's type.
        layers: number of layers.
        attention_width: width of all attention heads together.
        width: width of the hidden states.
        vocab_size: rows of the embedding.
    """

    parameters: int
    active: int
    embedding: int
    weight_bytes: float
    layers: int
    attention_width: int
    width: int
    vocab_size: int

    @property
    def is_mixture(self) -> bool:
        """Whether tokens use only some experts."""
        return self.active < self.parameters

    def forward_flops(self, length: float) -> float:
        """Return the floating-point operations of a token in a forward pass over rows of `length` tokens."""
        return 2 * (self.active - self.embedding) + 2 * self.layers * length * self.attention_width


def measure_size(name: str, *, trust_remote_code: bool = False) -> ModelSize:
    """Return the size of the model in a folder or with a hub id; only its `config.json` is read.

    Raises:
        InputError: the configuration cannot be read, or describes no causal language model.
    """
    from transformers import AutoModelForCausalLM

    whole = load_model_config(name, trust_remote_code=trust_remote_code)
    config = causal_config(whole, name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    model.tie_weights()
    config = config.get_text_config()
    parameters = dict(model.named_parameters())
    total = sum(parameter.numel() for parameter in parameters.values())
    experts = sum(p.numel() for key, p in parameters.items() if ".experts." in key)
    chosen = _first(config, "num_experts_per_tok", "top_k_experts", "moe_topk", default=1)
    available = _first(config, "num_experts", "num_local_experts", "n_routed_experts", default=1)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    is_tied = head is embedding  # a tied embedding is also the head, whose product counts
    heads = config.num_attention_heads
    return ModelSize(
        parameters=total,
        active=total - experts + round(experts * min(1.0, chosen / available)),
        embedding=0 if is_tied else embedding.numel(),
        weight_bytes=total * _bytes_per_weight(whole),
        layers=config.num_hidden_layers,
        attention_width=heads * (getattr(config, "head_dim", None) or config.hidden_size // heads),
        width=config.hidden_size,
        vocab_size=config.vocab_size,
    )


def _bytes_per_weight(config: Any) -> float:
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        values = quantization if isinstance(quantization, dict) else quantization.to_dict()
        return _QUANTIZED_BYTES.get(str(values.get("quant_method")), values.get("bits", 16) / 8)
    dtype = getattr(config, "dtype", None)
    return float(dtype.itemsize) if isinstance(dtype, torch.dtype) else 2.0


def _first(config: Any, *names: str, default: int) -> int:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), default)
