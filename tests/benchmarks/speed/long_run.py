"""A long run: memory, threads and open files of each process over 10,000 steps, and what the run leaves behind.

One worker of Ray Train learns from a served teacher with `logit_kd`, on a cluster of the run's own; a checkpoint every
250 steps, an evaluation every 500. After each thousand steps the processes are read: the driver, the worker, the
teacher's replica, and all others of Ray together. Memory is private (USS), so that shared libraries and the object
store do not count. Printed are these numbers, and at the end the run directory's size and what is left in /dev/shm
and /tmp.

    python -m tests.benchmarks.speed.long_run [--steps 10000]
"""

import argparse
import contextlib
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from uuid import uuid4

import psutil
import yaml

from tests.benchmarks.machine import machine
from tests.runs import metrics, processes, rayk, settings
from tests.tiny import tiny_model, tiny_tokenizer

READINGS = 10
KINDS = {"rayk.cli": "driver", "RayTrainWorker": "worker", "ServeReplica": "replica"}


def kind_of(process: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    return next((kind for part, kind in KINDS.items() if part in line), "others of Ray")


def read_processes(mark: dict[str, str]) -> dict[str, tuple[float, int, int]]:
    """Return the private memory in MB, the threads and the open files of each kind of process."""
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0, 0])
    for process in processes(**mark):
        with contextlib.suppress(psutil.Error):
            size, threads, files = process.memory_full_info().uss, process.num_threads(), process.num_fds()
            sums = found[kind_of(process)]
            sums[:] = [sums[0] + size / 1e6, sums[1] + threads, sums[2] + files]
    return {kind: (sums[0], int(sums[1]), int(sums[2])) for kind, sums in found.items()}


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def left_behind() -> set[str]:
    """Return the names in shared memory and of temporary folders; those of other programs too."""
    return {str(path) for place in ("/dev/shm", "/tmp") for path in Path(place).glob("*")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    steps = parser.parse_args().steps
    print(machine(), flush=True)
    before = left_behind()
    with tempfile.TemporaryDirectory(prefix="long_run") as name:
        folder = Path(name)
        tiny_model(folder / "teacher", seed=1, peaked=4.0, tokenizer=tiny_tokenizer())
        tiny_model(folder / "student", seed=2, hidden=16, layers=1, tokenizer=tiny_tokenizer())
        values = settings(
            folder, str(folder / "student"), "logit_kd", workers=1, steps=steps, learning_rate=1e-4,
            checkpoint_every_steps=250,
        )  # fmt: skip
        values["teachers"] = [{"name": "own", "model": str(folder / "teacher"), "resources": {"num_cpus": 0.5}}]
        values["data"]["evaluation"] = values["data"]["train"]
        values["evaluation"] = {"every_steps": 500}
        (folder / "run.yaml").write_text(yaml.safe_dump(values))
        mark, began = {"RAYK_TEST_MARK": uuid4().hex}, time.monotonic()
        print("| step | process | private MB | threads | open files |\n|---|---|---|---|---|")
        with rayk("run", folder / "run.yaml", log=folder / "log", **mark) as process:
            for reading in range(1, READINGS + 1):
                step = min(steps * reading // READINGS, steps - 20)
                while process.poll() is None and (metrics(folder / "run") or [{"step": 0}])[-1]["step"] < step:
                    time.sleep(0.5)
                for kind, (size, threads, files) in sorted(read_processes(mark).items()):
                    print(f"| {step:,} | {kind} | {size:.0f} | {threads} | {files} |", flush=True)
            process.wait()
        rows = metrics(folder / "run")
        print(f"Exit status {process.returncode}; {len(rows):,} rows of metrics in {time.monotonic() - began:.0f} s.")
        sizes = {path.name: folder_bytes(path) if path.is_dir() else path.stat().st_size for path in
                 (folder / "run").iterdir()}  # fmt: skip
        print("Run directory: " + ", ".join(f"{name} {size:,} bytes" for name, size in sorted(sizes.items())))
    print(f"Left behind: {sorted(left_behind() - before) or 'nothing'}")


if __name__ == "__main__":
    main()
