"""Tiny models of many architectures, with random weights that make attention and experts matter."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

VOCABULARY = 384
SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "tie_word_embeddings": False,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_HEADS = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8
}  # fmt: skip
_NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
_LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 12, "factor": 256 / 12,
}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": _EXPERTS | {"decoder_sparse_step": 2, "mlp_only_layers": [3]},
    "gemma2": {
        "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8, "sliding_window": 5
    },
    "gemma3_text": {
        "sliding_window": 5, "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
    },
    "phi3": {},
    "mistral": {"sliding_window": 5},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256} | _NO_DROPOUT,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "falcon_h1": {
        "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
    },
    "qwen3_next": _EXPERTS | _HEADS | {"shared_expert_intermediate_size": 16},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16,
        "n_shared_experts": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
        "v_head_dim": 8, "first_k_dense_replace": 2, "num_key_value_heads": 4,
    },
    "llama4_text": {
        "num_local_experts": 2, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 48,
        "attention_chunk_size": 8,
    },
    "phi3_longrope": {"model_type": "phi3", "rope_parameters": _LONG_ROPE},
    "jamba": {
        "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_dt_rank": 4,
        "mamba_d_state": 4,
    },
    "mamba": {"state_size": 4, "intermediate_size": 64},
    "rwkv": {"attention_hidden_size": 32, "context_length": 256},
}  # fmt: skip
_VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
_PATCHES = {
    "depth": 1, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "patch_size": 8, "intermediate_size": 16
}  # fmt: skip
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
VISION_LANGUAGE: dict[str, dict[str, Any]] = {
    "llava": {"text_config": SIZE | {"model_type": "llama"}, "vision_config": {"model_type": "clip_vision_model"}},
    "mistral3": {"text_config": SIZE | {"model_type": "mistral"}, "vision_config": {"model_type": "pixtral"}},
    "gemma3": {
        "text_config": SIZE | ARCHITECTURES["gemma3_text"], "vision_config": {"model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
    },
    "qwen2_5_vl": {"text_config": SIZE | {"rope_parameters": _SECTIONS}, "vision_config": _PATCHES},
    "qwen3_vl": {
        "text_config": SIZE | {"rope_parameters": _SECTIONS},
        "vision_config": _PATCHES | {"deepstack_visual_indexes": [0]},
    },
    "llama4": {
        "text_config": SIZE | ARCHITECTURES["llama4_text"],
        "vision_config": {"vision_output_dim": 32, "projector_input_dim": 16, "projector_output_dim": 32},
    },
}  # fmt: skip
"""Models that also read images, by type; the sizes of their vision towers are added."""


def make_architecture(kind: str, **changes: Any) -> Any:
    """Return a tiny model in eval mode."""
    settings = SIZE | {"model_type": kind} | ARCHITECTURES[kind] | changes
    return _random_weights(AutoModelForCausalLM, settings)


def make_vision_language(kind: str) -> Any:
    """Return a tiny model that also reads images, in eval mode."""
    settings = VISION_LANGUAGE[kind]
    vision = settings["vision_config"]
    return _random_weights(
        AutoModelForMultimodalLM,
        settings | {"model_type": kind, "vision_config": vision if vision.get("depth") else _VISION | vision},
    )


def _random_weights(loader: Any, settings: dict[str, Any]) -> Any:
    settings = dict(settings)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = loader.from_config(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and "vision" not in name and "visual" not in name:
                    parameter.normal_(std=0.2)
    return model
