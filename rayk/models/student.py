"""Build the student's model from its settings; every process builds the same weights."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rayk.config import StudentConfig
from rayk.errors import InputError
from rayk.models import DTYPES, check_head, load_model, load_model_config, real_vocab_size, weights_fingerprint
from rayk.models.kv_cache import can_continue
from rayk.models.layers import cut_config, cut_model
from rayk.models.loading import attention_options
from rayk.models.lora import add_adapter
from rayk.models.packing import enable_packing
from rayk.models.text_model import causal_config
from rayk.models.vocabulary import check_embedding


def make_model(config: StudentConfig, tokenizer, seed: int, device: str = "cpu") -> nn.Module:
    """Load the student's model, or initialize one from `seed`; also initialize its adapter from `seed`.

    Raises:
        InputError: the model cannot be loaded or built, or its vocabulary is smaller than the tokenizer's.
    """
    settings = build_model_config(config, tokenizer)
    model: Any
    base = None
    if config.model is not None:
        model = load_model(
            config.model, dtype=config.dtype, device=device, trust_remote_code=config.trust_remote_code,
            attention=config.attention,
        )  # fmt: skip
        if config.layers is not None:
            cut_model(model, config.layers, config.model)
        elif type(load_model_config(config.model, trust_remote_code=config.trust_remote_code)) is type(settings):
            base = config.model
    else:
        model = _random_model(settings, config, seed).to(device)
        check_head(model)
        enable_packing(model)
    if config.lora is not None:
        add_adapter(model, config.lora, seed, base)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # updates would be lost in the rounding of bfloat16
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def make_structure(config: StudentConfig, tokenizer) -> nn.Module:
    """Return the model of `make_model` with parameters without memory, on the meta device; its buffers are computed.

    Raises:
        InputError: the model cannot be built or cut.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model: Any = _build_structure(config, tokenizer)
    model.tie_weights()  # in that context each name got a parameter of its own
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.eval()


def saved_dtype(config: StudentConfig) -> torch.dtype:
    """Return the type in which the trained student is saved: as set, or that of the checkpoint it started from."""
    if config.save_dtype != "auto":
        return DTYPES[config.save_dtype]
    if config.model is None:
        return DTYPES[config.dtype]
    dtype = load_model_config(config.model, trust_remote_code=config.trust_remote_code).dtype
    return dtype if dtype in DTYPES.values() else torch.float32


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of trained parameters and of all parameters, including those of an adapter."""

    trained: int
    total: int

    def __str__(self) -> str:
        if self.trained == self.total:
            return f"all of its {self.total:,} parameters"
        return f"{self.trained:,} of {self.total:,} parameters ({self.trained / self.total:.2%})"


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the parameters of a loaded model."""
    parameters = list(model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return ParameterCount(trained, sum(parameter.numel() for parameter in parameters))


def count_planned_parameters(config: StudentConfig, tokenizer) -> ParameterCount:
    """Count the parameters of the model that `make_model` would return, without loading weights.

    Raises:
        InputError: the model cannot be built or cut.
    """
    return count_parameters(plan_model(config, tokenizer))


def check_student(config: StudentConfig, tokenizer, *, continues: bool) -> None:
    """Check that the student can be built, without loading weights.

    Args:
        continues: whether the student must continue sequences after the removal of their last tokens
            (`rayk.models.kv_cache`).

    Raises:
        InputError: it cannot.
    """
    if config.lora is None and config.layers is None and config.attention is None and not continues:
        return
    model = plan_model(config, tokenizer)
    if continues and not can_continue(model):
        raise InputError(
            f"method.teacher_share samples from student and teacher together, for which {type(model).__name__} cannot "
            "remove tokens from its cache; set it to 0, or choose a student with attention layers only."
        )


def plan_model(config: StudentConfig, tokenizer) -> nn.Module:
    """Return the model that `make_model` would return, with parameters of any value and without memory.

    Args:
        tokenizer: the run's tokenizer; None: the vocabulary is not compared with it.
    """
    with torch.device("meta"):
        return _build_structure(config, tokenizer)


def _build_structure(config: StudentConfig, tokenizer) -> nn.Module:
    from transformers import AutoModelForCausalLM

    settings = build_model_config(config.model_copy(update={"layers": None}), tokenizer)
    try:
        model = AutoModelForCausalLM.from_config(
            settings, trust_remote_code=config.trust_remote_code, **attention_options(settings, config.attention)
        )
    except (ValueError, ImportError) as error:
        if config.attention is None:
            raise
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"student.attention '{config.attention}' cannot be used: {reason}.") from error
    model.tie_weights()
    if config.layers is not None:
        cut_model(model, config.layers, str(config.model))
    if config.lora is not None:
        add_adapter(model, config.lora, 0, None)
    return model


def base_fingerprint(config: StudentConfig) -> str:
    """Return a hash of the frozen weights that an adapter belongs to; "" without an adapter or if unknown."""
    if config.lora is None or config.model is None:
        return ""
    settings = load_model_config(config.model, trust_remote_code=config.trust_remote_code)
    return weights_fingerprint(config.model, getattr(settings, "_commit_hash", None))


def build_model_config(config: StudentConfig, tokenizer) -> Any:
    """Return the student's transformers configuration.

    Raises:
        InputError: it cannot be loaded, describes no causal LM, or its vocabulary is smaller than the tokenizer's.
    """
    origin = config.model or config.config
    if isinstance(origin, str):
        settings = load_model_config(origin, trust_remote_code=config.trust_remote_code)
        settings = causal_config(settings, origin)
        if config.layers is not None:
            settings, _ = cut_config(settings, config.layers)
    else:
        settings = _config_from_fields(origin or {}, tokenizer)
    if tokenizer is not None:
        check_embedding(tokenizer, settings.get_text_config().vocab_size, str(config.model or "student.config"))
    return settings


def _config_from_fields(fields: dict[str, Any], tokenizer) -> Any:
    from transformers import AutoConfig

    values: dict[str, Any] = {}
    if tokenizer is not None:
        values |= {"vocab_size": real_vocab_size(tokenizer), "eos_token_id": tokenizer.eos_token_id}
        values |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    values |= fields
    if "model_type" not in values:
        raise InputError("student.config needs a 'model_type', such as 'llama' or 'qwen3'.")
    try:
        return causal_config(AutoConfig.for_model(values.pop("model_type"), **values), "student.config")
    except (ValueError, TypeError) as error:
        raise InputError(f"student.config does not describe a model: {str(error).splitlines()[0]}") from error


def _random_model(settings: Any, config: StudentConfig, seed: int) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            settings, trust_remote_code=config.trust_remote_code, **attention_options(settings, config.attention)
        )
    return model.to(DTYPES[config.dtype]).eval()
