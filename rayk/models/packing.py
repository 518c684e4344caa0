"""Rows of unlike length through a transformers body without computing their padding.

The rows' tokens stand one after the other in a single row; everything in a transformer but attention treats tokens one
by one and does not notice. Attention is taken row by row, by the implementation registered here: the rows' lengths
reach it as the attention mask, an integer one of four dimensions, which transformers hands through untouched.
"""

from typing import Any

import torch
from torch import Tensor

_NAME = "rayk_packed"
_ATTENTION_TYPES = {"full_attention", "sliding_attention"}


def enable_packing(model: Any) -> None:
    """Let `packed_hidden` run `model` (a transformers causal LM that uses `sdpa`), if it can be run so.

    A probe decides: a body that computes something else on packed rows keeps transformers' own attention.
    """
    if model.config._attn_implementation != "sdpa" or not _row_wise(model.config.get_text_config()):
        return
    _register()
    model.set_attn_implementation(_NAME)
    if not _agrees(model):
        model.set_attn_implementation("sdpa")


def can_pack(model: Any, longest: int) -> bool:
    """Whether `packed_hidden` gives what the body would for rows of up to `longest` tokens."""
    if model.config._attn_implementation != _NAME:
        return False
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    return window is None or longest <= window


def packed_hidden(body: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The body's last hidden states [rows, length, width] of right-padded rows; zeros at the padding."""
    real = attention_mask.bool()
    lengths = real.sum(dim=1)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    states = body(
        input_ids=input_ids[real][None],
        position_ids=positions[real][None],
        attention_mask=lengths[None, None, None],
        use_cache=False,
    ).last_hidden_state[0]
    hidden = states.new_zeros(*input_ids.shape, states.shape[1])
    return hidden.masked_scatter(real[:, :, None], states)


def _row_wise(config: Any) -> bool:
    """Whether attention is all that mixes tokens, as far as the configuration tells."""
    kinds = set(getattr(config, "layer_types", None) or ())
    return kinds <= _ATTENTION_TYPES and getattr(config, "attention_chunk_size", None) is None


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' `sdpa`, one call a row where the mask is the rows' lengths."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    lengths = attention_mask.flatten().tolist()
    rows = zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, *row, None, **options)[0] for row in rows], dim=1), None


@torch.no_grad()
def _agrees(model: Any) -> bool:
    """Compare packed with padded rows; one that leaks into the next, or a mask not handed through, shows here."""
    vocab_size = model.config.get_text_config().vocab_size
    ids = torch.arange(1, 25, device=model.device).reshape(3, 8) % vocab_size
    mask = (torch.arange(8, device=model.device) < torch.tensor([[5], [8], [2]], device=model.device)).long()
    body = getattr(model, model.base_model_prefix)
    try:
        packed = packed_hidden(body, ids, mask)
    except Exception:  # whatever a body that cannot take such a mask makes of it
        return False
    padded = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state * mask[:, :, None]
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.05
    return bool((packed - padded).abs().max() <= tolerance * padded.abs().max())
