"""Saving and restoring the training state of two gloo ranks: seconds, and memory beyond the state itself.

The state is weights and both moments of AdamW in float32, counted once however many ranks hold it. Printed are the
seconds for which training stands still (the copy), the seconds until the checkpoint is complete, and those of
restoring, checksums included; and the largest memory beside the state, summed over the ranks, as a multiple of the
state. Files are written to FOLDER, by default a temporary one.

    python -m tests.benchmarks.speed.checkpoint [--hidden 512] [--layers 8] [--folder FOLDER] [--rounds 3]
"""

import argparse
import ctypes
import gc
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rayk.config import parse_config
from rayk.run.inputs import read_inputs
from rayk.training.job import Job
from rayk.training.loop import Trainer
from rayk.training.ranks import Ranks
from tests.benchmarks.machine import machine
from tests.run.measure_memory import resident
from tests.runs import settings
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.rank_group import RankGroup
from tests.training.sharded_training import kept_bytes

MODES = {
    "copies (DDP)": {"sharding": "none"},
    "fsdp": {"sharding": "fsdp"},
}


def train_and_save(ranks: Ranks, job: Job) -> dict[str, float]:
    """Train, or continue a finished run, and save the state once; return this rank's figures."""
    trainer = Trainer(job, ranks)
    try:
        trainer.run()
        kept = kept_bytes(trainer.learner)
        ranks.gather(None)
        started = time.perf_counter()
        figures = {"state": kept["parameters"] + kept["optimizer"]}

        def save() -> None:
            trainer.checkpoints.save(trainer.step, is_evaluated=True)
            figures["copied"] = time.perf_counter() - started
            trainer.checkpoints.wait()
            figures["saved"] = time.perf_counter() - started

        return figures | {"extra_saving": _memory_beside(save)}
    finally:
        trainer.close()


def restore(ranks: Ranks, job: Job) -> dict[str, float]:
    """Restore the newest checkpoint in a new learner; return this rank's figures."""
    trainer = Trainer(job, ranks)
    try:
        trainer.learner.parallel.start()
        ranks.gather(None)
        figures: dict[str, float] = {}

        def load() -> None:
            started = time.perf_counter()
            step, _ = trainer.checkpoints.restore()
            assert step == trainer.total_steps
            figures["restored"] = time.perf_counter() - started

        extra = _memory_beside(load)
        moments = kept_bytes(trainer.learner)["optimizer"]  # loading allocates them: they are part of the state
        return figures | {"extra_restoring": max(0, extra - moments)}
    finally:
        trainer.close()


def _memory_beside(work: Callable[[], None]) -> int:
    """Return the bytes by which `work` raises this process's largest resident memory above what it has before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    work()
    return resident("VmHWM") - before


def make_job(folder: Path, student: str, chosen: dict[str, Any]) -> Job:
    values = settings(folder, student, steps=2, workers=2, checkpoint_every_steps=1000, threads=1, **chosen)
    config = parse_config(values)
    config.output_path.mkdir(exist_ok=True)
    inputs = read_inputs(config, {})
    assert inputs.train is not None
    return Job(config, inputs.tokenizer_name, {}, inputs.train.table, None, views=inputs.views)


def measure(folder: Path, student: str, chosen: dict[str, Any], rounds: int) -> dict[str, float]:
    """Return the medians of all rounds: bytes summed over the ranks, seconds of the slowest one."""
    folder.mkdir()
    job = make_job(folder, student, chosen)
    found: dict[str, list[float]] = {}
    for work in (train_and_save, restore) * rounds:
        group = RankGroup(2, Path(tempfile.mkdtemp(dir=folder)))
        try:
            ranks = group.run(work, job)
        finally:
            group.close()
        for name in ranks[0]:
            combine = max if name in ("copied", "saved", "restored") else sum
            found.setdefault(name, []).append(combine(rank[name] for rank in ranks))
    figures = {name: statistics.median(values) for name, values in found.items()}
    return figures | {"state": figures["state"] / (1 if chosen["sharding"] == "fsdp" else 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    print(machine(), flush=True)
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        tiny_model(folder / "student", hidden=options.hidden, layers=options.layers, tokenizer=tiny_tokenizer())
        for number, (mode, chosen) in enumerate(MODES.items()):
            found = measure(folder / str(number), str(folder / "student"), chosen, options.rounds)
            state = found["state"]
            print(
                f"{mode}: state {state / 1e6:,.0f} MB; training stands still for {found['copied']:.2f} s, complete "
                f"after {found['saved']:.2f} s, restored in {found['restored']:.2f} s; memory beside the state: saving "
                f"{found['extra_saving'] / state:.2f}, restoring {found['extra_restoring'] / state:.2f}",
                flush=True,
            )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
