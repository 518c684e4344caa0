"""The body of a causal LM, which computes hidden states, and the rows that one call of it may compute together."""

from typing import Any

from torch import nn

from rayk.errors import InputError
from rayk.models.types import CausalLM


def get_body(model: CausalLM) -> nn.Module:
    """Return the part of a causal LM that computes the hidden states.

    Raises:
        InputError: the model has no such part.
    """
    # The prefix of Llama 4's text model, "language_model", is that of the whole model's checkpoint.
    for name in (model.base_model_prefix, "model"):
        if isinstance(body := getattr(model, name, None), nn.Module):
            return body
    raise InputError(f"{type(model).__name__} has no separate body; rayk needs a causal language model with a head.")


def long_rope_start(config: Any) -> int | None:
    """Return the length beyond which a sequence gets the long factors of rotary embeddings with `longrope` (Phi-3 with
    a context of 128k); None for other models.

    transformers chooses the factors by the longest row of a batch, for all of its rows.
    """
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]
    starts = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    return min(starts, default=None)
