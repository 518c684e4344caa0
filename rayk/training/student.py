"""The student in training: body and head of a causal LM, the loss inside its forward pass, and the saved model."""

import contextlib
import copy
import logging
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from rayk.data.batches import Batch, micro_batches
from rayk.methods import Experience, Loss, Method
from rayk.models import DTYPES, Head, final_hidden, get_head
from rayk.models.dropout import disable_dropout
from rayk.models.ends import repair_generation_config
from rayk.models.loading import check_saved
from rayk.models.lora import has_adapter, has_saved_base, merged_state_dict, save_adapter
from rayk.storage.atomic import replace_folder

logger = logging.getLogger(__name__)

UNUSABLE = "unusable_share"
"""Name of the metric: the share of units that are marked in `Loss.unusable`."""


class Student(nn.Module):
    """A causal LM split into body and head (`rayk.methods.base.Student`).

    Args:
        precision: dtype of matrix products.
        max_tokens: tokens per forward pass of the body, padding included. A batch with more, such as the options of one
            query, is computed in parts, whose activations are recomputed in the backward pass. None: no limit.
        uses_dropout: whether training mode includes dropout.
    """

    def __init__(
        self, model: Any, precision: str = "float32", max_tokens: int | None = None, *, uses_dropout: bool = True
    ):  # fmt: skip
        super().__init__()
        self.model: Any = model
        self._compute_dtype = DTYPES[precision]
        self._max_tokens = max_tokens
        self._uses_dropout = uses_dropout

    def train(self, mode: bool = True) -> Self:
        """Enable training mode; without dropout if the student was created so."""
        super().train(mode)
        if mode and not self._uses_dropout:
            disable_dropout(self.model)
        return self

    @property
    def head(self) -> Head:
        return get_head(self.model)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the autocast context of `training.precision`; parameters keep their dtype."""
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, self._compute_dtype, enabled=self._compute_dtype != torch.float32)

    def hidden(self, batch: Batch) -> Tensor:
        if self._max_tokens is None or batch.rows == 1 or batch.input_ids.numel() <= self._max_tokens:
            return self._hidden(batch)
        groups = micro_batches([len(row) for row in batch.sequences], self._max_tokens)
        parts = [checkpoint(self._hidden, batch.select(rows), use_reentrant=False) for rows in groups]
        bounds = batch.offsets.tolist()
        order = torch.cat([torch.arange(bounds[row], bounds[row + 1]) for rows in groups for row in rows])
        return torch.cat(parts)[order.argsort().to(batch.offsets.device)]

    def _hidden(self, batch: Batch) -> Tensor:
        with self.autocast():
            states = final_hidden(self.model, batch.input_ids, batch.attention_mask)
        return batch.counted(states).to(self._compute_dtype)


class LossModule(nn.Module):
    """Student, head and loss as one forward pass, to be wrapped by DDP.

    DDP only sees gradients of what runs inside the wrapped forward pass, so head and loss must be part of it.
    """

    def __init__(self, student: Student, method: Method):
        super().__init__()
        self.student = student
        self.method_modules = method.modules()
        self._method = method

    def forward(self, experience: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each unit, [count], and the detached terms for the metrics."""
        loss: Loss = self._method.loss(self.student, experience)
        terms = {name: term.detach() for name, term in loss.terms.items()}
        if loss.unusable is None:
            return loss.per_token, terms
        terms = {name: term.masked_fill(loss.unusable, 0.0) for name, term in terms.items()}
        return loss.per_token.masked_fill(loss.unusable, 0.0), {**terms, UNUSABLE: loss.unusable.float()}


def wrap_for_ddp(module: LossModule) -> nn.Module:
    """Wrap `module` for data-parallel training if there is more than one worker."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return module
    return DistributedDataParallel(module, gradient_as_bucket_view=True, broadcast_buffers=False)


def save_model(model: Any, tokenizer, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Save a model so that `AutoModelForCausalLM.from_pretrained(folder)` loads it, with weights in `dtype` (None: as
    they are), and check that.

    A LoRA adapter is merged into the model, and also saved in peft's format in the sibling folder `adapter`, unless the
    model is only a part of `student.model`, on which the adapter could not be loaded. Each folder appears complete or
    not at all. Generation settings that transformers refuses to save are repaired.

    Raises:
        RunFailed: the saved model would not load completely.
    """
    if problem := repair_generation_config(model.generation_config):
        logger.warning("The student's generation_config.json was repaired, because it is not valid: %s", problem)
    if has_adapter(model) and has_saved_base(model):
        with replace_folder(folder.with_name("adapter")) as unfinished:
            save_adapter(model, unfinished)
    with replace_folder(folder) as unfinished:
        state = merged_state_dict(model) if has_adapter(model) else model.state_dict()
        model.save_pretrained(unfinished, state_dict=state if dtype is None else _cast(model, state, dtype))
        if dtype is not None:
            config = copy.deepcopy(model.config)  # save_pretrained writes the type that the model was trained in
            config.dtype = dtype
            config.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        check_saved(model, unfinished)


def _cast(model: Any, state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return `state` in `dtype`, except for tensors that the architecture keeps in float32. Tied tensors stay tied."""
    in_float32 = set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        in_float32 |= set(model._keep_in_fp32_modules or ())
    copies: dict[Any, Tensor] = {}
    for tensor in state.values():
        copies.setdefault((tensor.data_ptr(), tensor.shape), tensor.to(dtype) if tensor.is_floating_point() else tensor)
    return {
        name: tensor if in_float32 & set(name.split(".")) else copies[tensor.data_ptr(), tensor.shape]
        for name, tensor in state.items()
    }
