"""A description of this machine, and median times."""

import os
import platform
import statistics
import time
from collections.abc import Callable

import torch


def machine() -> str:
    """Describe this machine in one line."""
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?")
    threads = f"torch {torch.__version__} on {torch.get_num_threads()} threads"
    return f"{os.cpu_count()} cores ({model}), {threads}, Python {platform.python_version()}"


def median_seconds(*works: Callable[[], object], runs: int = 5) -> list[float]:
    """Return the median seconds of each of `works`; they take turns, so that noise affects all of them alike."""
    spent: list[list[float]] = [[] for _ in works]
    for work in works:
        work()
    for _ in range(runs):
        for work, seconds in zip(works, spent, strict=True):
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
    return [statistics.median(seconds) for seconds in spent]
