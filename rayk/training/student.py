"""The model that learns: made or loaded, run as body + head, saved as an ordinary transformers folder."""

import contextlib
from pathlib import Path

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


class Student(nn.Module):
    """A causal LM split into body and head (`rayk.methods.base.Student`)."""

    def __init__(self, model: nn.Module, precision: str = "float32"):
        super().__init__()
        self.model = model
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
        return loss.per_token, {name: term.detach() for name, term in loss.terms.items()}


def make_model(config: StudentConfig, tokenizer, seed: int, device: str = "cpu") -> nn.Module:
    """The student's model, loaded or with random weights drawn from `seed`.

    Raises:
        InputError: it cannot be loaded or made, or its vocabulary is smaller than the tokenizer's.
    """
    if config.model is not None:
        model = load_model(config.model, dtype=config.dtype, device=device, trust_remote_code=config.trust_remote_code)
    else:
        model = _random_model(config, tokenizer, seed).to(device)
        check_head(model)
    vocab_size = real_vocab_size(tokenizer)
    if head_of(model).vocab_size < vocab_size:
        raise InputError(
            f"The student's vocabulary ({head_of(model).vocab_size}) is smaller than its tokenizer's ({vocab_size}); "
            "give the tokenizer the student was made with, or set student.config.vocab_size."
        )
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _random_model(config: StudentConfig, tokenizer, seed: int) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    if isinstance(config.config, str):
        architecture = load_model_config(config.config, trust_remote_code=config.trust_remote_code)
    else:
        values = {"vocab_size": real_vocab_size(tokenizer), "eos_token_id": tokenizer.eos_token_id}
        values |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
        values |= config.config or {}
        try:
            architecture = AutoConfig.for_model(values.pop("model_type"), **values)
        except KeyError as error:
            raise InputError("student.config needs a 'model_type', such as 'llama' or 'qwen3'.") from error
        except (ValueError, TypeError) as error:
            raise InputError(f"student.config describes no model: {str(error).splitlines()[0]}") from error
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(architecture, trust_remote_code=config.trust_remote_code)
    return model.to(DTYPES[config.dtype]).eval()


def wrap(step: Step) -> nn.Module:
    """`step` for data-parallel training where there is more than one worker."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return step
    return DistributedDataParallel(step, gradient_as_bucket_view=True)


def save_model(model: nn.Module, tokenizer, folder: Path) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads; it appears whole or not at all."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    if folder.exists():
        import shutil

        shutil.rmtree(folder)
    unfinished.rename(folder)
