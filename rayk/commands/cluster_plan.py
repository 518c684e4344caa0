"""`rayk plan --gpu …`: speed of a run on a cluster and memory of its workers, from the models' configurations alone."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from rayk.config import RunConfig
from rayk.config.loading import with_absolute_paths
from rayk.run.capacity import Capacity, Efficiency, estimate_capacity
from rayk.run.devices import Device, DeviceMemory
from rayk.run.memory import MemoryEstimate, estimate_memory
from rayk.run.verdict import memory_verdict

ASSUMED_TOKENS = 1e9
"""Tokens of the training rows if the user names none."""
_EFFICIENCY = Efficiency()
Row = tuple[str, str, str]
"""The name of a figure, the figure, and its origin: measured, given, computed or estimated."""


def plan_cluster(
    config: RunConfig, device: Device, gpus: int, tokens: float | None = None, counted_share: float | None = None
) -> list[Row]:
    """Return the figures of `config`'s run on `gpus` GPUs of the type `device`; nothing is started and no row is read.

    Args:
        tokens: tokens of the training rows; None: `ASSUMED_TOKENS`.
        counted_share: share of them that enter the loss; None: all.

    Raises:
        InputError: as `estimate_capacity` and `estimate_memory`.
    """
    config = with_absolute_paths(config)
    capacity = estimate_capacity(
        config, device, gpus, tokens=tokens or ASSUMED_TOKENS, counted_share=counted_share or 1.0
    )
    memory = estimate_memory(config)
    limit = DeviceMemory("cuda", device.bytes, f"{device.name}, data sheet")
    origins = ("given" if tokens else "assumed, see --tokens", "given" if counted_share else "assumed: every token")
    return [*_capacity_rows(capacity, device, gpus, *origins), *memory_rows(memory, limit)]


def _capacity_rows(plan: Capacity, device: Device, gpus: int, tokens: str, share: str) -> list[Row]:
    peak = f"{device.teraflops:g} TFLOP/s in bfloat16 and {device.gigabytes_per_second:,.0f} GB/s each"
    teacher_share = _EFFICIENCY.mixture if plan.teacher.is_mixture else _EFFICIENCY.dense
    beside = plan.replicas * plan.replica_rate
    cached = plan.cache_seconds + plan.cached_seconds
    better = "shorter" if cached < plan.live_seconds else "longer"
    return [
        ("GPUs", f"{gpus} × {device.name}: {peak}", "data sheet"),
        ("teacher", _describe(plan.teacher.parameters, plan.teacher.active, plan.teacher.weight_bytes), "config.json"),
        ("student", _describe(plan.student.parameters, plan.student.active, plan.student.weight_bytes), "config.json"),
        (
            "one replica scores",
            f"{plan.replica_rate:,.0f} tokens/s on {plan.teacher_gpus} GPUs",
            f"estimated: {teacher_share:.0%} of the peak, or the reading of the weights",
        ),
        (
            "the student trains",
            f"{plan.student_rate:,.0f} tokens/s on {plan.workers} GPUs",
            f"estimated: {_EFFICIENCY.training:.0%} of the peak",
        ),
        (
            "the student would wait",
            f"{plan.waiting_share:.0%} of the time for {plan.replicas} replica(s) with {beside:,.0f} tokens/s",
            "estimated",
        ),
        ("training rows", f"{plan.tokens:,.0f} tokens, {plan.epochs:g} epoch(s)", tokens),
        ("counted tokens", f"{plan.counted_share:.0%}, {plan.signal_bytes:,.0f} bytes each", share),
        ("teacher beside the student", _duration(plan.live_seconds), "estimated"),
        (
            "`rayk cache` ahead",
            f"{_duration(plan.cache_seconds)} with {plan.most_replicas} replicas on all GPUs, "
            f"{plan.cache_bytes / 1e9:,.0f} GB",
            "estimated",
        ),
        (
            "training from the cache",
            f"{_duration(plan.cached_seconds)} with {plan.most_workers} workers beside one replica; with the cache "
            f"{_duration(cached)} in all, {better} than beside the student",
            "estimated",
        ),
    ]


def memory_rows(memory: MemoryEstimate, limit: DeviceMemory) -> list[Row]:
    """Return the parts of a worker's memory, their peak and whether it fits."""
    rows = [
        (f"memory: {part.name}", f"{part.bytes / 1e9:,.2f} GB", "computed" if part.is_certain else "estimated")
        for part in memory.parts
    ]
    state, sentence = memory_verdict(memory, limit)
    return [*rows, ("memory: largest at once", f"{memory.peak / 1e9:,.2f} GB", "estimated"), ("", sentence, state)]


def rows_table(rows: Sequence[Row]) -> Table:
    """Return figures as a table."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _describe(parameters: int, active: int, size: float) -> str:
    used = "" if active == parameters else f", of which a token uses {active / 1e9:,.1f}"
    return f"{parameters / 1e9:,.1f} billion parameters{used}; {size / 1e9:,.0f} GB of weights"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
