"""Estimate the memory of a training worker from the settings and the model's configuration, before anything starts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rayk.config import RunConfig
from rayk.config.rollouts import WorkerRollouts
from rayk.config.support import final_dtype
from rayk.losses.head_product import CHUNK_BYTES, KEPT_BYTES
from rayk.models import DTYPES, load_model_config
from rayk.models.activations import Activations, measure_activations
from rayk.models.student import plan_model

_PROCESS_BYTES = {"cpu": 0.8e9, "cuda": 1.5e9}
"""Libraries of a worker's process; on a GPU the CUDA context and the buffers of NCCL."""
_MOMENT_BYTES = {"adamw": 8, "adamw_8bit": 2}
_FULL_CHUNKS = 8
"""Chunks of logits that exist together where the divergence is computed over the whole vocabulary."""
_IDS_CHUNKS = 1
"""The same where it is computed at the ids of a signal."""
_USUAL_NODE = 8
"""Workers of a node, whose number is not known before the cluster is."""


@dataclass(frozen=True)
class MemoryPart:
    """One part of a worker's memory.

    Attributes:
        name: the part, for people.
        bytes: its size.
        is_certain: whether the run certainly needs it; other parts depend on the rows, or are estimates.
        phase: `always`, or when it exists: `gradients` (the backward pass and the update), `step` (the forward and the
            backward pass), `rollouts` (generation), or `host` for what lies in the memory of a GPU's node.
    """

    name: str
    bytes: float
    is_certain: bool
    phase: str = "always"


@dataclass(frozen=True)
class MemoryEstimate:
    """The parts of a worker's memory on its device."""

    parts: tuple[MemoryPart, ...]
    tokens: int
    """Tokens of the micro-batch that the estimate is for."""
    repeats: bool
    """Whether a step has several micro-batches, so that gradients exist while activations are computed."""
    overlaps: bool
    """Whether rollouts are generated while a step is computed."""

    @property
    def certain(self) -> float:
        """Bytes that the run needs in any case."""
        return sum(part.bytes for part in self.parts if part.is_certain)

    @property
    def peak(self) -> float:
        """Estimated bytes at the fullest moment."""
        always, gradients, step, rollouts = (
            sum(part.bytes for part in self.parts if part.phase == phase)
            for phase in ("always", "gradients", "step", "rollouts")
        )
        training = gradients + step if self.repeats else max(gradients, step)
        return always + (training + rollouts if self.overlaps else max(training, rollouts))


def estimate_memory(
    config: RunConfig, tokenizer: Any = None, *, longest: int | None = None, row_tokens: float | None = None,
    device: str = "cuda",
) -> MemoryEstimate:  # fmt: skip
    """Estimate the memory of one worker of `config`.

    Args:
        tokenizer: the run's tokenizer; None: not known.
        longest: tokens of the longest row; None: `data.max_tokens`.
        row_tokens: mean tokens of a row; None: `longest`.
        device: `cuda` or `cpu`, which decides the sizes of some buffers.

    Raises:
        InputError: the student cannot be built from its settings.
    """
    training = config.training
    model = _planned_student(config, tokenizer)
    longest = longest or config.data.max_tokens
    rows = max(1, training.batch_size // max(1, training.least_workers))
    step_tokens = int(rows * (row_tokens or longest))
    tokens = min(training.micro_batch_tokens, step_tokens)
    length = min(longest, tokens)
    parts = [
        *_state_parts(config, model),
        *_activation_parts(config, model, max(1, tokens // length), length),
        *_loss_parts(config, model, tokens, device),
        *_teacher_parts(config, tokens),
        *_following_parts(config, model, device),
        *_rollout_parts(config, model, device),
        MemoryPart("libraries" if device == "cpu" else "CUDA and NCCL", _PROCESS_BYTES[device], False),
    ]
    overlaps = config.rollouts is not None and config.rollouts.max_staleness > 0
    return MemoryEstimate(
        tuple(part for part in parts if part.bytes), tokens, step_tokens > training.micro_batch_tokens, overlaps
    )


def _planned_student(config: RunConfig, tokenizer: Any) -> nn.Module:
    """Return the student without memory, with the types that `make_model` gives its parameters."""
    model = plan_model(config.student, tokenizer)
    frozen = DTYPES[config.student.dtype]
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else frozen)
    return model


def _shards(config: RunConfig) -> int:
    """Return the number of workers that share one copy of the trained state."""
    training = config.training
    sharding, workers = training.sharding, max(1, training.least_workers)
    if sharding == "hsdp":
        return training.shards or min(workers, _USUAL_NODE)
    return workers if sharding == "fsdp" else 1


def _state_parts(config: RunConfig, model: Any) -> Iterator[MemoryPart]:
    shards, parameters = _shards(config), list(model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    yield MemoryPart("weights", weights / shards, True)
    yield MemoryPart("gradients", 4 * trained / shards, True, "gradients")
    yield MemoryPart("optimizer", _MOMENT_BYTES[config.training.optimizer] * trained / shards, True)
    if shards == 1:
        return
    # FSDP2 gathers weights in the type of the computation: all of them until the last micro-batch (`last`), or one
    # layer at a time and the next one (`always`).
    count, itemsize = sum(p.numel() for p in parameters), DTYPES[config.training.precision].itemsize
    if config.training.reshard == "last":
        yield MemoryPart("gathered weights", itemsize * count, True, "step")
        yield MemoryPart("gathered gradients", 4 * trained, False, "step")
    else:
        layers = model.config.get_text_config().num_hidden_layers
        ends = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
        root = sum(weight.numel() for weight in ends)  # gathered for the whole pass
        yield MemoryPart("gathered weights", itemsize * (root + 2 * (count - root) / layers), False, "step")


def _activation_parts(config: RunConfig, model: Any, rows: int, length: int) -> Iterator[MemoryPart]:
    found = _measured_activations(config, model, rows, length)
    recomputes = config.student.gradient_checkpointing
    copies = 0 if _shards(config) > 1 else found.weight_copies
    if copies:
        yield MemoryPart(f"weights in {config.training.precision}", copies, False, "step")
    size = found.inputs + 2 * found.layer if recomputes else found.tensors
    yield MemoryPart("activations, recomputed" if recomputes else "activations", size, False, "step")


def _measured_activations(config: RunConfig, model: Any, rows: int, length: int) -> Activations:
    try:
        return measure_activations(model, rows, length, config.training.precision)
    except Exception:  # a body whose shapes depend on values, such as a mixture of experts, can raise anything
        return _formula_activations(model, rows * length, config.training.precision)


def _formula_activations(model: Any, tokens: int, precision: str) -> Activations:
    """Return the sizes for a usual decoder: two norms in float32, attention, and a gated MLP of the active experts."""
    settings = model.config.get_text_config()
    width, layers = settings.hidden_size, settings.num_hidden_layers
    size = getattr(settings, "head_dim", None) or width // settings.num_attention_heads
    heads = settings.num_attention_heads * size
    experts = getattr(settings, "num_experts_per_tok", None) or 1
    inner = experts * (getattr(settings, "moe_intermediate_size", None) or settings.intermediate_size)
    layer = tokens * (4 * 4 * width + DTYPES[precision].itemsize * (2 * width + 5 * heads + 4 * inner))
    return Activations(layers * layer, 0, layer, layers * tokens * 4 * width)


def _loss_parts(config: RunConfig, model: Any, tokens: int, device: str) -> Iterator[MemoryPart]:
    """Yield the memory of `linear_log_probs` or of a chunked divergence over the whole vocabulary."""
    weight = model.get_output_embeddings().weight
    vocab_size, width = weight.shape
    itemsize = DTYPES[config.training.precision].itemsize
    chunk = min(tokens, max(16, CHUNK_BYTES[device] // (4 * vocab_size))) * vocab_size * 4
    chunks = _IDS_CHUNKS if final_dtype(config.signal_support) is None else _FULL_CHUNKS
    kept = min(KEPT_BYTES[device], tokens * vocab_size * itemsize)
    size = kept + (chunks + (itemsize < 4)) * chunk
    if weight.requires_grad:
        size += 4 * weight.numel()
    if itemsize < weight.element_size():
        size += (2 if weight.requires_grad else 1) * itemsize * weight.numel()
    yield MemoryPart("loss, in chunks", size + 2 * tokens * width * itemsize, False, "step")


def _following_parts(config: RunConfig, model: Any, device: str) -> Iterator[MemoryPart]:
    """Yield the weights of teachers that follow the student, and the versions of them published for replicas."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    for teacher in config.training_teachers:
        if teacher.follows == "student":
            versions = 2 + (config.rollouts.max_staleness if config.rollouts else 0)
            size, phase = 4 * versions * trained, "always" if device == "cpu" else "host"
            yield MemoryPart(f"published weights of teacher '{teacher.name}'", size, False, phase)
            if teacher.ema or teacher.every > 1:
                yield MemoryPart(f"weights of teacher '{teacher.name}'", 4 * trained, False)


def _teacher_parts(config: RunConfig, tokens: int) -> Iterator[MemoryPart]:
    """Yield the heads of teachers that return hidden states, one copy a device."""
    if (dtype := final_dtype(config.signal_support)) is None:
        return
    for teacher in config.signal_teachers:
        if teacher.model is None:
            continue
        settings = load_model_config(teacher.model, trust_remote_code=teacher.trust_remote_code).get_text_config()
        itemsize = DTYPES[dtype].itemsize
        size = itemsize * settings.hidden_size * (settings.vocab_size + tokens)
        yield MemoryPart(f"head of teacher '{teacher.name}'", size, False)


def _rollout_parts(config: RunConfig, model: Any, device: str) -> Iterator[MemoryPart]:
    """Yield the keys and values of a group of rollouts in the worker, or both versions of the weights published for
    replicas."""
    rollouts, settings = config.rollouts, model.config.get_text_config()
    if rollouts is not None and rollouts.is_served:
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        yield MemoryPart("published weights", 8 * trained, False, "always" if device == "cpu" else "host")
    if isinstance(rollouts, WorkerRollouts):
        heads = getattr(settings, "num_key_value_heads", None) or settings.num_attention_heads
        size = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
        itemsize = DTYPES[config.training.precision].itemsize
        total = 2 * rollouts.batch_tokens * settings.num_hidden_layers * heads * size * itemsize
        yield MemoryPart("keys and values of rollouts", total, False, "rollouts")


def largest(parts: Sequence[MemoryPart], count: int = 2) -> str:
    """Return the names of the largest parts, for people."""
    return " and ".join(part.name for part in sorted(parts, key=lambda part: -part.bytes)[:count])
