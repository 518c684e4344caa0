"""The model that learns: made or loaded, run as body + head, saved as an ordinary transformers folder."""

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rayk.config import StudentConfig
from rayk.data.batches import Batch
from rayk.errors import InputError
from rayk.methods import Experience, Method
from rayk.models import (
    DTYPES,
    Head,
    check_head,
    final_hidden,
    head_of,
    load_model,
    load_model_config,
    real_vocab_size,
)
from rayk.packing import enable_packing


class Student(nn.Module):
    """A causal LM split into body and head (`rayk.methods.base.Student`)."""

    def __init__(self, model: Any, precision: str = "float32"):
        super().__init__()
        self.model: Any = model
        self._compute_dtype = DTYPES[precision]

    @property
    def head(self) -> Head:
        return head_of(self.model)

    def autocast(self) -> contextlib.AbstractContextManager:
        """The step's compute type; parameters keep theirs."""
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, self._compute_dtype, enabled=self._compute_dtype != torch.float32)

    def hidden(self, batch: Batch) -> Tensor:
        with self.autocast():
            states = final_hidden(self.model, batch.input_ids, batch.attention_mask)
        return batch.counted(states).to(self._compute_dtype)


UNUSABLE = "unusable_share"
"""The term that counts `Loss.unusable`."""


class Step(nn.Module):
    """Hidden → head → loss as one forward, which is what DDP wraps: a head or loss outside of it would go
    unsynchronised (PLATFORM §5)."""

    def __init__(self, student: Student, method: Method):
        super().__init__()
        self.student = student
        self.method_modules = method.modules()
        self._method = method

    def forward(self, experience: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self._method.loss(self.student, experience)
        terms = {name: term.detach() for name, term in loss.terms.items()}
        if loss.unusable is None:
            return loss.per_token, terms
        return loss.per_token.masked_fill(loss.unusable, 0.0), {**terms, UNUSABLE: loss.unusable.float()}


def make_model(config: StudentConfig, tokenizer, seed: int, device: str = "cpu") -> nn.Module:
    """The student's model, loaded or with random weights drawn from `seed`.

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
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


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


def wrap(step: Step) -> nn.Module:
    """`step` for data-parallel training where there is more than one worker."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return step
    return DistributedDataParallel(step, gradient_as_bucket_view=True, broadcast_buffers=False)


def save_model(model: Any, tokenizer, folder: Path) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads; it appears whole or not at all."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    if folder.exists():
        import shutil

        shutil.rmtree(folder)
    unfinished.rename(folder)
