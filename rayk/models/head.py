"""The `Head` of a causal language model: the map from final hidden states to logits."""

import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rayk.errors import InputError
from rayk.models.packing import can_pack, packed_hidden
from rayk.models.types import DTYPES, CausalLM


@dataclass(frozen=True)
class Head:
    """The map from final hidden states to logits: cap·tanh((scale·(W h + b))/cap), each part optional.

    Attributes:
        weight: [vocab, width].
        bias: [vocab] or None.
        scale: multiplies the logits (Granite, Cohere, Falcon-H1); 1 elsewhere.
        softcap: Gemma's cap on logits; None elsewhere.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    def to(self, device: torch.device | str) -> "Head":
        """The same head on `device`."""
        return replace(self, weight=self.weight.to(device), bias=None if self.bias is None else self.bias.to(device))

    def select(self, ids: Tensor) -> "Head":
        """The head of the tokens `ids` alone, in their order."""
        return replace(self, weight=self.weight[ids], bias=None if self.bias is None else self.bias[ids])

    def truncate(self, vocab_size: int) -> "Head":
        """The head of the first `tokens` tokens alone, sharing memory."""
        return replace(
            self, weight=self.weight[:vocab_size], bias=None if self.bias is None else self.bias[:vocab_size]
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits [tokens, vocab] of hidden states [tokens, width]; the product runs in `hidden`'s dtype."""
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        logits = nn.functional.linear(hidden, self.weight.to(hidden.dtype), bias).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def pack_head(head: Head) -> dict[str, Any]:
    """`head` as plain values and byte arrays, which Ray shares between processes without copying."""
    tensors = {"weight": head.weight, "bias": head.bias}
    packed = {
        name: None if tensor is None else tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
        for name, tensor in tensors.items()
    }
    return packed | {"dtype": str(head.weight.dtype), "scale": head.scale, "softcap": head.softcap}


def unpack_head(packed: dict[str, Any]) -> Head:
    """What `pack_head` made; the tensors share the arrays' memory and must not be written to."""
    dtype = next(each for each in DTYPES.values() if str(each) == packed["dtype"])

    def tensor(array: np.ndarray | None) -> Tensor | None:
        if array is None:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the array is read-only
            return torch.from_numpy(array).view(dtype)

    weight = tensor(packed["weight"])
    assert weight is not None
    return Head(weight, tensor(packed["bias"]), packed["scale"], packed["softcap"])


def get_head(model: CausalLM) -> Head:
    """The head of a transformers causal LM, sharing its parameters.

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


def final_hidden(model: CausalLM, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Hidden states after the final norm, [rows, length, width], of right-padded rows."""
    body = getattr(model, model.base_model_prefix)
    if can_pack(model, input_ids.shape[1]) and not attention_mask.all():
        return packed_hidden(body, input_ids, attention_mask)
    return body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


@torch.no_grad()
def check_head(model: CausalLM) -> None:
    """Compare body + `Head` with the model's own logits on a short probe.

    Raises:
        InputError: they differ, so this architecture does something between body and logits that `Head` does not know;
            or they are not numbers.
    """
    vocab_size = get_head(model).vocab_size
    probe = torch.arange(1, 9, device=model.device)[None] % vocab_size
    mask = torch.ones_like(probe)
    own = model(input_ids=probe, attention_mask=mask, use_cache=False).logits[0].float()
    ours = get_head(model).logits(final_hidden(model, probe, mask)[0])
    if own.isnan().any():
        raise InputError(f"{type(model).__name__} computes NaN from its weights; the checkpoint is damaged.")
    # Against the logits' own spread: a missing scale shows on flat distributions too, and rounding looks like none.
    own, ours = own - own.mean(1, keepdim=True), ours - ours.mean(1, keepdim=True)
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.05
    if (own - ours).abs().max() > tolerance * own.abs().max():
        raise InputError(
            f"{type(model).__name__} computes its logits in a way rayk's Head does not describe (they differ by up to "
            f"{(own - ours).abs().max():.3g}); please report the architecture, since training on these would be wrong."
        )
