"""Whether a worker's memory suffices, as a finding with a sentence."""

import os
from typing import Literal

import ray

from rayk.config import RunConfig
from rayk.errors import InputError
from rayk.run.devices import DeviceMemory, worker_memory
from rayk.run.inputs import Inputs
from rayk.run.memory import MemoryEstimate, estimate_memory, largest

State = Literal["ok", "note", "wrong"]


def estimate_worker(config: RunConfig, inputs: Inputs, limit: DeviceMemory) -> MemoryEstimate:
    """Estimate the memory of a worker that trains on the run's rows, if they are known."""
    table = inputs.train
    return estimate_memory(
        config, inputs.tokenizer, longest=None if table is None else table.longest,
        row_tokens=None if table is None else float(table.lengths.mean()), device=limit.kind,
    )  # fmt: skip


def check_memory(config: RunConfig, inputs: Inputs) -> str | None:
    """Compare the memory that a worker needs with this machine's, if the run starts a Ray cluster on it.

    Returns:
        A sentence if the estimate is above the memory; else None.

    Raises:
        InputError: what the worker needs in any case does not fit.
    """
    is_elsewhere = ray.is_initialized() or os.environ.get("RAY_ADDRESS", "local") not in ("", "local")
    if is_elsewhere and config.training.workers:
        return None
    limit = worker_memory(config)
    try:
        estimate = estimate_worker(config, inputs, limit)
    except Exception:  # a model with an unusual configuration can raise anything, and an estimate must not stop a run
        return None
    state, sentence = memory_verdict(estimate, limit)
    if state == "wrong":
        raise InputError(sentence)
    return sentence if state == "note" else None


def memory_verdict(memory: MemoryEstimate, limit: DeviceMemory) -> tuple[State, str]:
    """Compare an estimate with the memory of a worker.

    Returns:
        `wrong` if parts that the run certainly needs do not fit, `note` if the estimated peak does not, else `ok`; and
        a sentence.
    """
    room = f"{limit.bytes / 1e9:,.1f} GB ({limit.source})"
    if memory.certain > limit.bytes:
        return "wrong", (
            f"A worker needs {memory.certain / 1e9:,.1f} GB for {largest([p for p in memory.parts if p.is_certain])} "
            f"and the like, but has {room}; use student.lora, training.optimizer 'adamw_8bit', "
            "training.sharding 'fsdp' with more workers, or a smaller student."
        )
    if memory.peak > limit.bytes:
        return "note", (
            f"A worker is estimated to need {memory.peak / 1e9:,.1f} GB, mostly {largest(memory.parts)}, but "
            f"has {room}; lower training.micro_batch_tokens, or set student.gradient_checkpointing."
        )
    return "ok", f"A worker is estimated to need {memory.peak / 1e9:,.1f} GB of {room}."
