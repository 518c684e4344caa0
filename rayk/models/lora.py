"""Train a small adapter on a student with frozen weights (LoRA, Hu et al. 2021, arXiv 2106.09685, §4.1).

    h = W x + (α/r)·B A x        A [r, in] random, B [out, r] zero, both float32; W frozen

so the student's outputs before training are exactly those of its base model. peft adds the pairs (A, B) to the model's
own layers, and the model keeps its transformers class, so body, head and generation work as without an adapter. Only
parameters that require gradients are optimized, stored in checkpoints and sent to a served policy's replicas. The head
cannot have a pair (A, B), because losses use its weight directly (`rayk.models.Head`).
"""

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rayk.config import LoraConfig
from rayk.errors import InputError
from rayk.models.lora_targets import adaptable_layers, unsuitable_reason

_NAME = "default"
_TRAINED_COPY = f".modules_to_save.{_NAME}."


def add_adapter(model: Any, settings: LoraConfig, seed: int, base: str | None) -> None:
    """Freeze `model` (a transformers causal LM) and add an adapter to it, with A sampled from `seed`.

    Args:
        base: the model's folder or hub id, which is written to peft's adapter config; None if it is not saved as it is.

    Raises:
        InputError: peft is not installed, or the settings name modules that do not exist or cannot be adapted.
    """
    peft = _peft()
    _check_names(model, "target_modules", settings.target_modules)
    _check_names(model, "modules_to_save", settings.modules_to_save)
    targets = adaptable_layers(model) if settings.target_modules == "all-linear" else settings.target_modules
    if not targets:
        raise InputError(f"student.lora: {type(model).__name__} has no linear layers to adapt; leave it out.")
    config = peft.LoraConfig(
        r=settings.r, lora_alpha=settings.alpha, lora_dropout=settings.dropout, task_type="CAUSAL_LM",
        target_modules=targets, modules_to_save=settings.modules_to_save or None,
        base_model_name_or_path=base,
    )  # fmt: skip
    model.requires_grad_(False)
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.simplefilter("ignore", UserWarning)  # GPT-2's weights are transposed, which peft handles
        try:
            peft.inject_adapter_in_model(config, model, _NAME)
        except (ValueError, TypeError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise InputError(f"student.lora cannot be added to {type(model).__name__}: {reason}.") from error
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()


def has_adapter(model: Any) -> bool:
    """Return whether `model` has an adapter from `add_adapter`."""
    return hasattr(model, "peft_config")


def has_saved_base(model: Any) -> bool:
    """Return whether the adapter belongs to a saved model, as it is in its folder or on the hub."""
    return bool(model.peft_config[_NAME].base_model_name_or_path)


@torch.no_grad()
def merged_state_dict(model: Any) -> dict[str, Tensor]:
    """Return the state dict with the adapter merged, W + (α/r)·B A, in W's dtype and under the base's names."""
    state = {}
    for name, tensor in model.state_dict().items():
        if ".lora_" in name or ".original_module." in name:
            continue
        layer, _, part = name.partition(".base_layer.")
        if part == "weight":
            update = model.get_submodule(layer).get_delta_weight(_NAME)
            tensor = (tensor.float() + update).to(tensor.dtype).cpu()
        state[name.replace(".base_layer.", ".").replace(_TRAINED_COPY, ".")] = tensor
    return state


def save_adapter(model: Any, folder: Path) -> None:
    """Save the adapter of `model` in peft's format, for `PeftModel.from_pretrained`."""
    peft = _peft()
    state = peft.get_peft_model_state_dict(model, adapter_name=_NAME, save_embedding_layers=False)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"base_model.model.{name}": tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.copy(model.peft_config[_NAME])
    config.inference_mode = True
    config.save_pretrained(folder)


def _check_names(model: Any, field: str, names: str | list[str]) -> None:
    """Check that each of `names` (a module's full name or its last part) exists and suits the setting `field`."""
    if isinstance(names, str):
        return
    modules = dict(model.named_modules())
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is embeddings.weight
    for name in names:
        matches = [module for key, module in modules.items() if key == name or key.endswith(f".{name}")]
        setting = f"student.lora.{field} names '{name}'"
        if not matches:
            known = {key.rpartition(".")[2] for key, module in modules.items() if _is_matrix(module)}
            raise InputError(f"{setting}, which {type(model).__name__} lacks; it has {', '.join(sorted(known))}.")
        if any(next(module.children(), None) for module in matches):
            raise InputError(f"{setting}, which contains other modules; name those.")
        if tied and any(module is head or module is embeddings for module in matches):
            raise InputError(f"{setting}, but the student's embeddings and head are one tensor; leave it out.")
        if field == "target_modules" and (reason := unsuitable_reason(model, name)):
            raise InputError(f"{setting}, {reason}, so leave it out.")
        if field == "target_modules" and any(module is head for module in matches):
            raise InputError(
                f"{setting}, the student's head; name it in student.lora.modules_to_save, or leave it out."
            )


def _is_matrix(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise InputError("student.lora needs the peft package: pip install 'rayk[lora]'") from error
    return peft
