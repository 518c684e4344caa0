"""The model that learns: run as body + head, saved as an ordinary transformers folder."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rayk.data.batches import Batch
from rayk.methods import Experience, Method
from rayk.models import DTYPES, Head, final_hidden, head_of
from rayk.models.lora import has_adapter, merged, save_adapter


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
        terms = {name: term.masked_fill(loss.unusable, 0.0) for name, term in terms.items()}
        return loss.per_token.masked_fill(loss.unusable, 0.0), {**terms, UNUSABLE: loss.unusable.float()}


def wrap(step: Step) -> nn.Module:
    """`step` for data-parallel training where there is more than one worker."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return step
    return DistributedDataParallel(step, gradient_as_bucket_view=True, broadcast_buffers=False)


def save_model(model: Any, tokenizer, folder: Path) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads; an adapter is merged into it, and lies in
    `adapter` beside it as peft's own. Each appears whole or not at all."""
    if has_adapter(model):
        with _appearing(folder.with_name("adapter")) as unfinished:
            save_adapter(model, unfinished)
    with _appearing(folder) as unfinished:
        model.save_pretrained(unfinished, state_dict=merged(model) if has_adapter(model) else None)
        tokenizer.save_pretrained(unfinished)


@contextlib.contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """Where to write what is to stand in `folder` once it is whole."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    yield unfinished
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)
