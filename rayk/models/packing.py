"""Run rows of different lengths through the body of a transformers model without computing on padding.

The rows' tokens are concatenated to a single row. All parts of a transformer except attention process each token alone,
so this does not change their results. The attention implementation registered here runs attention row by row. It
receives the rows' lengths as the attention mask, an integer tensor of four dimensions, which transformers passes
through unchanged.
"""

from typing import Any

import torch
from torch import Tensor

from rayk.models.body import get_body

_NAME = "rayk_packed"
_ATTENTION_TYPES = {"full_attention", "sliding_attention"}


def enable_packing(model: Any) -> None:
    """Enable `packed_hidden` for `model` (a transformers causal LM that uses `sdpa`), if its results are correct.

    A test run decides: a body that computes different values for packed rows keeps transformers' own attention.
    """
    if model.config._attn_implementation != "sdpa" or not mixes_by_attention_only(model.config.get_text_config()):
        return
    _register()
    model.set_attn_implementation(_NAME)
    if not _packs_correctly(model):
        model.set_attn_implementation("sdpa")


def adopt_attention(model: Any, implementation: str) -> None:
    """Let `model` use the implementation that another process has chosen for it (`enable_packing`)."""
    if implementation == _NAME:
        _register()
    if model.config._attn_implementation != implementation:
        model.set_attn_implementation(implementation)


def can_pack(model: Any, longest: int) -> bool:
    """Return whether `packed_hidden` equals the body's own result for rows of up to `longest` tokens."""
    if model.config._attn_implementation != _NAME:
        return False
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    return not window or longest <= window


def call_attention_uncompiled() -> None:
    """Keep the attention of packed rows out of compiled code, which would be compiled again for each set of lengths."""
    from transformers import AttentionInterface

    _register()
    AttentionInterface.register(_NAME, torch.compiler.disable(_attention))


def packed_hidden(body: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Compute the body's last hidden states [rows, length, width] of right-padded rows; zeros at the padding."""
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


def mixes_by_attention_only(config: Any) -> bool:
    """Return whether, by the configuration, tokens influence each other through attention only."""
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
    """Call transformers' `sdpa`, once per row if the mask contains the rows' lengths."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    lengths = attention_mask.flatten().tolist()
    rows = zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, *row, None, **options)[0] for row in rows], dim=1), None


@torch.no_grad()
def _packs_correctly(model: Any) -> bool:
    """Return whether packed and padded rows give the same states. This detects rows that influence each other and masks
    that are not passed through."""
    vocab_size = model.config.get_text_config().vocab_size
    ids = torch.arange(1, 25, device=model.device).reshape(3, 8) % vocab_size
    mask = (torch.arange(8, device=model.device) < torch.tensor([[5], [8], [2]], device=model.device)).long()
    try:
        body = get_body(model)
        packed = packed_hidden(body, ids, mask)
    except Exception:  # a body that does not support such a mask can raise anything
        return False
    padded = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state * mask[:, :, None]
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.05
    return bool((packed - padded).abs().max() <= tolerance * padded.abs().max())
