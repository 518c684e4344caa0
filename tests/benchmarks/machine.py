"""What a benchmark ran on, and medians of several runs."""

import os
import platform
import statistics
import time
from collections.abc import Callable

import torch


def machine() -> str:
    """One line about this machine."""
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?")
    threads = f"torch {torch.__version__} on {torch.get_num_threads()} threads"
    return f"{os.cpu_count()} cores ({model}), {threads}, Python {platform.python_version()}"


def median_seconds(*works: Callable[[], object], runs: int = 5) -> list[float]:
    """Median seconds of each piece of work, run in turn so that noise falls on all alike."""
    spent: list[list[float]] = [[] for _ in works]
    for work in works:
        work()
    for _ in range(runs):
        for work, seconds in zip(works, spent, strict=True):
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
    return [statistics.median(seconds) for seconds in spent]
