"""The student in training: body and head of a causal LM, the loss inside its forward pass, and the saved model."""

import contextlib
import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rayk.config.support import LayerPart
from rayk.data.batches import Batch, micro_batches
from rayk.methods import Experience, Loss, Method
from rayk.models import DTYPES, Head, final_hidden, get_head
from rayk.models.dropout import disable_dropout
from rayk.models.ends import repair_generation_config
from rayk.models.layer_states import attention_widths, layer_numbers, layer_states, state_width
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
        self.minimum_parts = 1
        """The least number of parts in which `hidden` computes a batch. Workers with sharded weights compute equally
        many."""

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
        groups = self._parts(batch)
        missing = self.minimum_parts - len(groups)
        if len(groups) == 1 and missing <= 0:
            return self._hidden(batch)
        parts = [checkpoint(self._hidden, batch.select(rows), use_reentrant=False) for rows in groups]
        # An additional part only takes part in the collectives; none of its results are used.
        shortest = batch.select([min(range(batch.rows), key=lambda row: len(batch.sequences[row]))])
        parts += [checkpoint(self._hidden, shortest, use_reentrant=False)[:0] for _ in range(missing)]
        bounds = batch.offsets.tolist()
        order = torch.cat([torch.arange(bounds[row], bounds[row + 1]) for rows in groups for row in rows])
        return torch.cat(parts)[order.argsort().to(batch.offsets.device)]

    @property
    def layer_width(self) -> int:
        return state_width(self.model.config)

    def layer_numbers(self, layers: int | Sequence[int]) -> list[int]:
        return layer_numbers(layers, self.model.config, "the student")

    @property
    def attention_widths(self) -> tuple[int, int, int]:
        return attention_widths(self.model.config)

    def layer_states(
        self, batch: Batch, layers: Sequence[int], part: LayerPart = "output"
    ) -> tuple[Tensor, list[Tensor]]:
        with self.autocast():
            final, states = layer_states(self.model, batch.input_ids, batch.attention_mask, layers, part)
        return batch.counted(final).to(self._compute_dtype), [batch.counted(each) for each in states]

    def count_parts(self, batch: Batch) -> int:
        """Return the number of parts in which `hidden` would compute the batch by itself."""
        return len(self._parts(batch))

    def _parts(self, batch: Batch) -> list[list[int]]:
        """Group the rows of a batch by the forward passes of the body that compute them."""
        if self._max_tokens is None or batch.rows == 1 or batch.input_ids.numel() <= self._max_tokens:
            return [list(range(batch.rows))]
        return micro_batches([len(row) for row in batch.sequences], self._max_tokens)

    def _hidden(self, batch: Batch) -> Tensor:
        with self.autocast():
            states = final_hidden(self.model, batch.input_ids, batch.attention_mask)
        return batch.counted(states).to(self._compute_dtype)


class LossModule(nn.Module):
    """Student, head and loss as one forward pass, to be wrapped by DDP or sharded.

    Both only see what runs inside that forward pass, so head and loss must be part of it.
    """

    def __init__(self, student: Student, method: Method):
        super().__init__()
        self.student = student
        method.start(student)
        self.method_modules = method.modules()
        self._method = method
        self.trains_in_stages = method.trains_in_stages

    def forward(self, experience: Experience | None) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Return the loss of each unit, [count], and the detached terms for the metrics; None without experience."""
        if experience is None:
            return None
        loss: Loss = self._method.loss(self.student, experience)
        terms = {name: term.detach() for name, term in loss.terms.items()}
        if loss.unusable is None:
            return loss.per_token, terms
        terms = {name: term.masked_fill(loss.unusable, 0.0) for name, term in terms.items()}
        return loss.per_token.masked_fill(loss.unusable, 0.0), {**terms, UNUSABLE: loss.unusable.float()}


def save_model(
    model: Any, tokenizer, folder: Path, dtype: torch.dtype | None = None, *, adapter: Path | None = None
) -> None:  # fmt: skip
    """Save a model so that `AutoModelForCausalLM.from_pretrained(folder)` loads it, with weights in `dtype` (None: as
    they are), and check that.

    A LoRA adapter is merged into the model, and also saved in peft's format in the folder `adapter` (None: the sibling
    of that name), unless the model is only a part of `student.model`, on which the adapter could not be loaded. Each
    folder appears complete or not at all. Generation settings that transformers refuses to save are repaired.

    Raises:
        RunFailed: the saved model would not load completely.
    """
    if problem := repair_generation_config(model.generation_config):
        logger.warning("The student's generation_config.json was repaired, because it is not valid: %s", problem)
    if has_adapter(model) and has_saved_base(model):
        with replace_folder(adapter or folder.with_name("adapter")) as unfinished:
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
