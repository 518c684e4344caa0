"""The model that learns, made or loaded: alike wherever a run needs a copy of it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rayk.config import StudentConfig
from rayk.errors import InputError
from rayk.models import DTYPES, check_head, load_model, load_model_config, real_vocab_size, weights_fingerprint
from rayk.models.lora import add_adapter
from rayk.models.packing import enable_packing


def make_model(config: StudentConfig, tokenizer, seed: int, device: str = "cpu") -> nn.Module:
    """The student's model, loaded or with random weights drawn from `seed`; an adapter's too.

    Raises:
        InputError: it cannot be loaded or made, or its vocabulary is smaller than the tokenizer's.
    """
    settings = architecture(config, tokenizer)
    model: Any
    if config.model is not None:
        model = load_model(config.model, dtype=config.dtype, device=device, trust_remote_code=config.trust_remote_code)
    else:
        model = _random_model(settings, config, seed).to(device)
        check_head(model)
        enable_packing(model)
    if config.lora is not None:
        add_adapter(model, config.lora, seed, str(config.model))
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


@dataclass(frozen=True)
class Size:
    """How many parameters a model has, and how many of them train; an adapter's own count in both."""

    trained: int
    total: int

    def __str__(self) -> str:
        if self.trained == self.total:
            return f"all of its {self.total:,} parameters"
        return f"{self.trained:,} of {self.total:,} parameters ({self.trained / self.total:.2%})"


def count_parameters(model: nn.Module) -> Size:
    """The size of a model that is there."""
    parameters = list(model.parameters())
    return Size(
        sum(each.numel() for each in parameters if each.requires_grad), sum(each.numel() for each in parameters)
    )


def count_planned_parameters(config: StudentConfig, tokenizer) -> Size:
    """The size of the model that `make_model` would make, from its architecture alone.

    Raises:
        InputError: it cannot be made, as far as the architecture tells.
    """
    from transformers import AutoModelForCausalLM

    settings = architecture(config, tokenizer)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, trust_remote_code=config.trust_remote_code)
        model.tie_weights()
        if config.lora is not None:
            add_adapter(model, config.lora, 0, str(config.model))
    return count_parameters(model)


def base_fingerprint(config: StudentConfig) -> str:
    """A hash of the frozen weights that an adapter belongs to; "" where all weights learn, or nothing tells."""
    if config.lora is None or config.model is None:
        return ""
    settings = load_model_config(config.model, trust_remote_code=config.trust_remote_code)
    return weights_fingerprint(config.model, getattr(settings, "_commit_hash", None))


def architecture(config: StudentConfig, tokenizer) -> Any:
    """The student's transformers configuration, without its weights.

    Raises:
        InputError: there is none, or its vocabulary is smaller than the tokenizer's.
    """
    origin = config.model or config.config
    if isinstance(origin, str):
        settings = load_model_config(origin, trust_remote_code=config.trust_remote_code)
    else:
        settings = _described(origin or {}, tokenizer)
    theirs, vocab_size = settings.get_text_config().vocab_size, real_vocab_size(tokenizer)
    if theirs < vocab_size:
        raise InputError(
            f"The student's vocabulary ({theirs}) is smaller than its tokenizer's ({vocab_size}); give the tokenizer "
            "the student was made with, or set student.config.vocab_size."
        )
    return settings


def _described(given: dict[str, Any], tokenizer) -> Any:
    from transformers import AutoConfig

    values = {"vocab_size": real_vocab_size(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    values |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id} | given
    if "model_type" not in values:
        raise InputError("student.config needs a 'model_type', such as 'llama' or 'qwen3'.")
    try:
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except (ValueError, TypeError) as error:
        raise InputError(f"student.config describes no model: {str(error).splitlines()[0]}") from error


def _random_model(settings: Any, config: StudentConfig, seed: int) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(settings, trust_remote_code=config.trust_remote_code)
    return model.to(DTYPES[config.dtype]).eval()
