"""Devices to plan for: memory, speed and bandwidth of common GPUs, and the memory of this machine or cluster."""

import os
import re
import subprocess
from dataclasses import dataclass

from rayk.config import RunConfig
from rayk.config.base import closest
from rayk.errors import InputError

_SMI_SECONDS = 20.0


@dataclass(frozen=True)
class Device:
    """A GPU by its maker's data sheet: peak rates without sparsity."""

    name: str
    gigabytes: float
    """Memory in 10⁹ bytes."""
    teraflops: float
    """10¹² operations per second in bfloat16."""
    gigabytes_per_second: float
    """Memory bandwidth in 10⁹ bytes per second."""

    @property
    def bytes(self) -> float:
        """Memory in bytes."""
        return self.gigabytes * 1e9


DEVICES = {
    device.name: device
    for device in (
        Device("a10g", 24, 70, 600),
        Device("l4", 24, 121, 300),
        Device("l40s", 48, 362, 864),
        Device("a100-40gb", 40, 312, 1555),
        Device("a100", 80, 312, 2039),
        Device("h100-pcie", 80, 756, 2000),
        Device("h100", 80, 989, 3350),
        Device("gh200", 96, 989, 4000),
        Device("h200", 141, 989, 4800),
        Device("b200", 180, 2250, 8000),
        Device("mi300x", 192, 1307, 5300),
    )
}
"""GPUs by the name that `--gpu` takes; SXM boards unless the name says otherwise."""


def find_device(name: str) -> Device:
    """Return the GPU `name`.

    Raises:
        InputError: it is not in the list.
    """
    if (device := DEVICES.get(name.lower())) is not None:
        return device
    near = closest(name.lower(), DEVICES)
    hint = f"did you mean '{near}'? " if near else ""
    raise InputError(f"--gpu '{name}' is not known; {hint}Known GPUs: {', '.join(DEVICES)}.")


def parse_bytes(text: str) -> float:
    """Return the bytes of a size such as 80GB or 512MiB; a bare number is in gigabytes.

    Raises:
        InputError: the text is no positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?)?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise InputError(f"--device-memory '{text}' is no size; give one such as 80GB.")
    base = 1024 if match[3] else 1000
    return float(match[1]) * base ** ("kmgt".index((match[2] or "g").lower()) + 1)


@dataclass(frozen=True)
class DeviceMemory:
    """The memory that one worker may use."""

    kind: str
    """`cuda` or `cpu`."""
    bytes: float
    source: str
    """Where the number comes from, for people."""


def _first_gpu() -> tuple[str, float]:
    """Return name and memory of this machine's first GPU; torch asked for them would take some of the memory."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True)
        name, mebibytes = done.stdout.splitlines()[0].rsplit(",", 1)
        return name.strip(), float(mebibytes) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):  # no such program, or not a GPU of NVIDIA
        import torch

        return torch.cuda.get_device_name(0), float(torch.cuda.get_device_properties(0).total_memory)


def worker_memory(config: RunConfig, given: str | None = None) -> DeviceMemory:
    """Return the memory of one training worker.

    Args:
        given: the size of a GPU as the user writes it; None: a GPU of this machine, or a worker's share of the
            machine's memory if it has none or the workers use none.
    """
    if given is not None:
        return DeviceMemory("cuda", parse_bytes(given), "given")
    import torch

    gpus = config.training.resources.num_gpus
    if gpus != 0 and torch.cuda.is_available():
        name, total = _first_gpu()
        return DeviceMemory("cuda", total * min(1.0, gpus or 1.0), f"{name} of this machine")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    workers = max(1, config.training.most_workers)
    divided = f", divided by {workers} workers" if workers > 1 else ""
    return DeviceMemory("cpu", total / workers, f"this machine's memory{divided}")
