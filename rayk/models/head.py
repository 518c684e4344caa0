"""The `Head` of a causal language model, which maps final hidden states to logits."""

import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayk.errors import InputError
from rayk.models.body import get_body, long_rope_start
from rayk.models.packing import can_pack, packed_hidden
from rayk.models.product import linear_float32
from rayk.models.types import DTYPES, CausalLM


@dataclass(frozen=True)
class Head:
    """A map from final hidden states to logits, cap·tanh((scale·(W h + b))/cap); each part is optional.

    Attributes:
        weight: [vocab, width].
        bias: [vocab] or None.
        scale: factor of the logits (Granite, Cohere, Falcon-H1); 1 in other models.
        softcap: Gemma's cap on logits; None in other models.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    _copies: dict[str, "Head"] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        """The size of hidden states."""
        return self.weight.shape[1]

    def to(self, device: torch.device | str) -> "Head":
        """Return the same head on `device`. The copy is kept and returned again, so do not call this for weights that
        change."""
        if (key := str(device)) not in self._copies:
            bias = None if self.bias is None else self.bias.to(device)
            self._copies[key] = replace(self, weight=self.weight.to(device), bias=bias)
        return self._copies[key]

    def select(self, ids: Tensor) -> "Head":
        """Return the head of the tokens `ids` only, in their order."""
        return replace(self, weight=self.weight[ids], bias=None if self.bias is None else self.bias[ids])

    def truncate(self, vocab_size: int) -> "Head":
        """Return the head of the first `vocab_size` tokens only, sharing memory."""
        bias = None if self.bias is None else self.bias[:vocab_size]
        return replace(self, weight=self.weight[:vocab_size], bias=bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute float32 logits [tokens, vocab] of hidden states [tokens, width]; the product runs in their dtype
        (`linear_float32`)."""
        logits = linear_float32(hidden, self.weight, self.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def pack_head(head: Head) -> dict[str, Any]:
    """Convert `head` to plain values and byte arrays, which Ray shares between processes without copying."""
    tensors = {"weight": head.weight, "bias": head.bias}
    packed = {
        name: None if tensor is None else tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
        for name, tensor in tensors.items()
    }
    return packed | {"dtype": str(head.weight.dtype), "scale": head.scale, "softcap": head.softcap}


def unpack_head(packed: dict[str, Any]) -> Head:
    """Restore a head from `pack_head`. Its tensors share the arrays' memory; do not write to them."""
    dtype = next(dtype for dtype in DTYPES.values() if str(dtype) == packed["dtype"])

    def to_tensor(array: np.ndarray | None) -> Tensor | None:
        if array is None:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the array is read-only
            return torch.from_numpy(array).view(dtype)

    weight = to_tensor(packed["weight"])
    assert weight is not None
    return Head(weight, to_tensor(packed["bias"]), packed["scale"], packed["softcap"])


def get_head(model: CausalLM) -> Head:
    """Return the head of a transformers causal LM, sharing its parameters.

    Raises:
        InputError: the model has no output embedding.
    """
    projection = model.get_output_embeddings()
    if projection is None or not hasattr(projection, "weight"):
        raise InputError(f"{type(model).__name__} has no output embedding; rayk needs a causal language model.")
    config = model.config.get_text_config()
    scale = 1.0
    if getattr(config, "logits_scaling", None):
        scale /= config.logits_scaling  # Granite
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon-H1
        if isinstance(getattr(config, name, None), float | int):
            scale *= getattr(config, name)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(projection.weight, getattr(projection, "bias", None), scale, softcap)


def get_decoding_head(model: CausalLM) -> Head:
    """Return a head for a few states at a time: its weights are copied once into the layout, and under autocast the
    type, in which such products are fastest. Use it only while the weights do not change."""
    head = get_head(model)
    weight, device = head.weight, head.weight.device.type
    if torch.is_autocast_enabled(device):
        weight = weight.to(torch.get_autocast_dtype(device))
    return replace(head, weight=weight.t().contiguous().t() if device == "cpu" else weight)


def final_hidden(model: CausalLM, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Compute the hidden states after the final norm, [rows, length, width], of right-padded rows."""
    input_ids = input_ids * attention_mask  # the tokenizer's padding id may be past the embedding
    start = long_rope_start(model.config)
    if start is not None and input_ids.shape[1] > start:
        is_long = attention_mask.sum(dim=1) > start
        if not is_long.all():
            return _hidden_by_length(model, input_ids, attention_mask, is_long)
    body = get_body(model)
    if can_pack(model, input_ids.shape[1]) and not attention_mask.all():
        return packed_hidden(body, input_ids, attention_mask)
    return body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


def _hidden_by_length(model: CausalLM, input_ids: Tensor, attention_mask: Tensor, is_long: Tensor) -> Tensor:
    """Compute long and short rows separately, because the longest row of a batch decides the rotary embeddings of all;
    zeros at the padding."""
    parts: dict[int, Tensor] = {}
    for rows in (is_long.nonzero()[:, 0], (~is_long).nonzero()[:, 0]):
        if len(rows):
            longest = int(attention_mask[rows].sum(dim=1).max())
            states = final_hidden(model, input_ids[rows, :longest], attention_mask[rows, :longest])
            padded = torch.nn.functional.pad(states, (0, 0, 0, input_ids.shape[1] - longest))
            parts |= dict(zip(rows.tolist(), padded, strict=True))
    return torch.stack([parts[row] for row in range(len(input_ids))])


@torch.no_grad()
def check_head(model: CausalLM) -> None:
    """Check that body and `Head` reproduce the model's own logits on a short sequence.

    Raises:
        InputError: they do not, because the architecture has an operation between body and logits that `Head` lacks; or
            the logits are NaN.
    """
    head = get_head(model)
    probe = torch.arange(1, 9, device=model.device)[None] % head.vocab_size
    mask = torch.ones_like(probe)
    expected = model(input_ids=probe, attention_mask=mask, use_cache=False).logits[0].float()
    logits = head.logits(final_hidden(model, probe, mask)[0])
    if expected.isnan().any():
        raise InputError(f"{type(model).__name__} computes NaN from its weights; the checkpoint is damaged.")
    # Relative to the logits' own spread: this detects a missing scale on flat distributions, and tolerates rounding.
    expected, logits = expected - expected.mean(1, keepdim=True), logits - logits.mean(1, keepdim=True)
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.05
    if (expected - logits).abs().max() > tolerance * expected.abs().max():
        raise InputError(
            f"{type(model).__name__} computes its logits in a way that rayk's Head does not implement (they differ by "
            f"up to {(expected - logits).abs().max():.3g}); please report the architecture, because training with "
            "these logits would be wrong."
        )
