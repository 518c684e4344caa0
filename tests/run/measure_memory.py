"""Train students of several kinds in this process and print the largest resident memory of each beside the estimate.

`python -m tests.run.measure_memory FOLDER` prints one JSON line per case. It is a program of its own, because the
resident memory of a process with other tests in it says nothing.
"""

import ctypes
import gc
import json
import sys
from pathlib import Path

import numpy as np
import torch

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


def measure(config: RunConfig) -> int:
    """Return the bytes that two training steps need at most, above what the process has before the model is loaded."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    model = make_model(config.student, tiny_tokenizer(), config.seed)
    method = resolve_method(config.method)(config.method, None, None)
    student = Student(model, config.training.precision, config.training.micro_batch_tokens)
    learner = Learner(LossModule(student, method).train(), config.training, Ranks(0, 1, 1), "cpu")
    for step in range(2):
        learner.train_step([batch()], step, 1e-4)
    return resident("VmHWM") - before


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    tiny_model(folder, vocab_size=VOCAB, hidden=256, layers=4, tokenizer=tiny_tokenizer())
    for changes in ({}, CASES["LoRA float32"]):  # libraries are loaded and allocate buffers in their first call
        measure(settings(folder, changes))
    for name, changes in CASES.items():
        config = settings(folder, changes)
        estimate = estimate_memory(config, device="cpu")
        parts = {part.name: round(part.bytes) for part in estimate.parts if part.name != "libraries"}
        libraries = sum(part.bytes for part in estimate.parts if part.name == "libraries")
        record = {"case": name, "measured": measure(config), "estimated": round(estimate.peak - libraries)}
        print(json.dumps(record | {"parts": parts}), flush=True)


if __name__ == "__main__":
    main()
