"""Causal language models as rayk uses them: loading, the body that makes hidden states, and the `Head` that reads them.

Body and head are kept apart because the head is the dear part of a small model with a large vocabulary: it is applied
only where a token counts, and only a chunk of positions at a time.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from rayk.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits [tokens, vocab] of hidden states [tokens, width]; the product runs in `hidden`'s dtype."""
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        logits = nn.functional.linear(hidden, self.weight.to(hidden.dtype), bias).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def first(self, vocab_size: int) -> "Head":
        """The head of the first `vocab_size` tokens: rows past the tokenizer's last id are padding, not vocabulary."""
        if vocab_size >= self.vocab_size:
            return self
        return replace(self, weight=self.weight[:vocab_size], bias=None if self.bias is None else self.bias[:vocab_size])


def head_of(model: nn.Module) -> Head:
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


def final_hidden(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Hidden states after the final norm, [rows, length, width], of right-padded rows."""
    body = getattr(model, model.base_model_prefix)
    return body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Compare body + `Head` with the model's own logits on a short probe.

    Raises:
        InputError: they differ, so this architecture does something between body and logits that `Head` does not know.
    """
    vocab_size = head_of(model).vocab_size
    probe = torch.arange(1, 9, device=model.device)[None] % vocab_size
    mask = torch.ones_like(probe)
    own = model(input_ids=probe, attention_mask=mask, use_cache=False).logits[0].float().log_softmax(-1)
    ours = head_of(model).logits(final_hidden(model, probe, mask)[0]).log_softmax(-1)
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    if (own - ours).abs().max() > tolerance:
        raise InputError(
            f"{type(model).__name__} computes its logits in a way rayk's Head does not describe (they differ by "
            f"{(own - ours).abs().max():.3g} nats); please report the architecture, since training on these would be wrong."
        )


def load_model(name: str, *, dtype: str = "auto", device: str = "cpu", trust_remote_code: bool = False) -> nn.Module:
    """A causal LM from a local folder or a hub id, on `device`, its head checked.

    Raises:
        InputError: the folder or id holds no causal language model that can be loaded.
    """
    from transformers import AutoModelForCausalLM

    chosen = "auto" if dtype == "auto" else DTYPES[dtype]
    model = _from_pretrained(AutoModelForCausalLM, name, "model", dtype=chosen, trust_remote_code=trust_remote_code)
    model = model.to(device)
    check_head(model.eval())
    return model


def load_tokenizer(name: str, *, trust_remote_code: bool = False):
    """The tokenizer of a local folder or a hub id.

    Raises:
        InputError: there is none that can be loaded.
    """
    from transformers import AutoTokenizer

    return _from_pretrained(AutoTokenizer, name, "tokenizer", trust_remote_code=trust_remote_code)


def load_model_config(name: str, *, trust_remote_code: bool = False):
    """The architecture settings (`config.json`) of a local folder or a hub id."""
    from transformers import AutoConfig

    return _from_pretrained(AutoConfig, name, "model configuration", trust_remote_code=trust_remote_code)


def real_vocab_size(tokenizer) -> int:
    """One more than the tokenizer's highest id. Models often pad their embeddings past it."""
    return max(tokenizer.get_vocab().values()) + 1


def pick_device(device: str = "auto") -> str:
    """`auto` is the first GPU this process sees, else the CPU."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _from_pretrained(loader, name: str, what: str, **options):
    if _looks_like_path(name) and not Path(name).expanduser().is_dir():
        raise InputError(f"The {what} folder '{name}' does not exist; give a model folder or a hub id.")
    try:
        return loader.from_pretrained(os.path.expanduser(name), **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"No {what} could be loaded from '{name}': {reason}") from error


def _looks_like_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or Path(name).is_dir()
