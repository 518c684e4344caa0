"""The prompts that a model can continue in one left-padded batch without changing each other's results."""

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from rayk.models import CausalLM
from rayk.models.body import long_rope_start
from rayk.models.kv_cache import can_continue

_ignores_padding: WeakKeyDictionary[CausalLM, bool] = WeakKeyDictionary()


@dataclass(frozen=True)
class RowGroup:
    """Rows that can be continued in one batch."""

    rows: list[int]
    use_cache: bool = True
    """Whether the keys and values of earlier tokens stay valid while the rows grow."""


def generation_groups(model: CausalLM, lengths: Sequence[int], max_new_tokens: int) -> list[RowGroup]:
    """Group the indices of prompts with these lengths.

    Prompts of different lengths are separated for models on which padding before them has an effect (RWKV). Where a
    sequence outgrows the start of a model's long rotary embeddings, all of its tokens get other keys.
    """
    start = long_rope_start(model.config)
    if start is not None:
        short = [row for row, length in enumerate(lengths) if length + max_new_tokens <= start]
        long = [row for row, length in enumerate(lengths) if length > start]
        growing = sorted(set(range(len(lengths))) - {*short, *long})
        return [RowGroup(rows) for rows in (short, long) if rows] + [RowGroup([row], False) for row in growing]
    if len(set(lengths)) == 1 or can_continue(model) or ignores_padding(model):
        return [RowGroup(list(range(len(lengths))))]
    return [RowGroup([row for row, other in enumerate(lengths) if other == each]) for each in sorted(set(lengths))]


def ignores_padding(model: CausalLM) -> bool:
    """Return whether masked tokens before a prompt have no effect on its continuation, by a test on a short one."""
    if model not in _ignores_padding:
        ids = torch.arange(1, 6, device=model.device)[None] % model.config.get_text_config().vocab_size
        padded = torch.cat([torch.zeros_like(ids[:, :3]), ids], dim=1)
        expected = _next_logits(model, ids, torch.ones_like(ids))
        logits = _next_logits(model, padded, (torch.arange(8, device=model.device) >= 3).long()[None])
        tolerance = 1e-3 if model.dtype == torch.float32 else 0.05
        _ignores_padding[model] = bool((logits - expected).abs().max() <= tolerance * expected.abs().max())
    return _ignores_padding[model]


def _next_logits(model: CausalLM, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return the logits of the next two tokens, float32 [2, vocab]; the second one is computed from the cache."""
    output = model.generate(
        input_ids, attention_mask=attention_mask, max_new_tokens=2, min_new_tokens=2, do_sample=False, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return torch.cat(output.logits).float()
