"""Causal language models in two parts: the body, which computes hidden states, and the `Head`, which computes logits.

Body and head are separate because the head is the expensive part of a small model with a large vocabulary: it runs only
at counted tokens, and only on a limited number of them at a time.
"""

from rayk.models.fingerprint import real_vocab_size, tokenizer_fingerprint, weights_fingerprint
from rayk.models.head import Head, check_head, final_hidden, get_head, pack_head, unpack_head
from rayk.models.loading import (
    load_generation_config,
    load_head,
    load_model,
    load_model_config,
    load_tokenizer,
    max_positions,
    pick_device,
    quiet_loading,
)
from rayk.models.types import DTYPES, CausalLM

__all__ = [
    "DTYPES",
    "CausalLM",
    "Head",
    "check_head",
    "final_hidden",
    "get_head",
    "load_generation_config",
    "load_head",
    "load_model",
    "load_model_config",
    "load_tokenizer",
    "max_positions",
    "pack_head",
    "pick_device",
    "quiet_loading",
    "real_vocab_size",
    "tokenizer_fingerprint",
    "unpack_head",
    "weights_fingerprint",
]
