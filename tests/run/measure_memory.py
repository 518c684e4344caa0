"""Train students of several kinds in this process and print the largest memory of each beside the estimate.

`python -m tests.run.measure_memory FOLDER` prints one JSON line per case. It is a program of its own, because the
resident memory of a process with other tests in it says nothing.
"""

import ctypes
import gc
import json
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from rayk.config import RunConfig
from rayk.data.batches import collate
from rayk.methods import Experience, resolve_method
from rayk.models.student import make_model
from rayk.run.memory import estimate_memory
from rayk.signals.sequence import TokenSequence
from rayk.training.learner import Learner
from rayk.training.ranks import Ranks
from rayk.training.student import LossModule, Student
from tests.tiny import tiny_model, tiny_tokenizer

VOCAB, LENGTH, ROWS, MICRO_BATCH_ROWS = 8192, 128, 6, 3
CASES = {
    "full float32": {},
    "full bfloat16": {"training": {"precision": "bfloat16"}},
    "LoRA float32": {"student": {"lora": {"r": 8}}},
    "LoRA bfloat16": {"student": {"lora": {"r": 8}, "dtype": "bfloat16"}, "training": {"precision": "bfloat16"}},
    "full recomputed": {"student": {"gradient_checkpointing": True}},
}


def settings(folder: Path, changes: dict) -> RunConfig:
    training = {"workers": 0, "batch_size": ROWS, "micro_batch_tokens": MICRO_BATCH_ROWS * LENGTH, "steps": 2}
    return RunConfig(
        student={"model": str(folder), **changes.get("student", {})},
        data={"train": {"path": "rows.jsonl"}, "max_tokens": LENGTH},
        method={"kind": "supervised"},
        training={**training, **changes.get("training", {})},
    )


def resident(name: str) -> int:
    """Return a figure of this process's memory in bytes: VmRSS (now) or VmHWM (the largest since its reset)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(name)


def batch() -> Experience:
    random = np.random.default_rng(0)
    rows = [
        TokenSequence(random.integers(4, VOCAB, LENGTH).astype(np.int32), np.arange(LENGTH) >= 1) for _ in range(ROWS)
    ]
    return Experience(collate(rows, 0))


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all tensors that are made in its context and still exist."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._note, result)
        return result

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._live:
            self._live[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self._live.pop, storage._cdata, None)
            self.peak = max(self.peak, sum(self._live.values()))


def measure_tensors(config: RunConfig) -> int:
    """Return the bytes of the tensors of two training steps that exist at the same time, at most."""
    gc.collect()
    with LiveTensors() as tensors:
        train(config)
    return tensors.peak


def measure_resident(config: RunConfig) -> int:
    """Return the bytes that two training steps need at most, above what the process has before the model is loaded."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    train(config)
    return resident("VmHWM") - before


def train(config: RunConfig) -> None:
    """Train for two steps."""
    model = make_model(config.student, tiny_tokenizer(), config.seed)
    method = resolve_method(config.method)(config.method, None, None)
    student = Student(model, config.training.precision, config.training.micro_batch_tokens)
    learner = Learner(LossModule(student, method).train(), config.training, Ranks(0, 1, 1), "cpu")
    for step in range(2):
        learner.train_step([batch()], step, 1e-4)


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    tiny_model(folder, vocab_size=VOCAB, hidden=256, layers=4, tokenizer=tiny_tokenizer())
    for changes in ({}, CASES["LoRA float32"]):  # libraries are loaded and allocate buffers in their first call
        measure_resident(settings(folder, changes))
    for name, changes in CASES.items():
        config = settings(folder, changes)
        estimate = estimate_memory(config, device="cpu")
        parts = {part.name: round(part.bytes) for part in estimate.parts if part.name != "libraries"}
        libraries = sum(part.bytes for part in estimate.parts if part.name == "libraries")
        measured = {"resident": measure_resident(config), "tensors": measure_tensors(config)}
        record = {"case": name, "estimated": round(estimate.peak - libraries)} | measured
        print(json.dumps(record | {"parts": parts}), flush=True)


if __name__ == "__main__":
    main()
