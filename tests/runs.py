"""Small runs for tests: rows, settings, and `rayk` in a separate process that can be killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from safetensors.numpy import load_file

from rayk.config import RunConfig, parse_config
from rayk.methods import METHODS, Method
from rayk.run import distill

PATIENCE_SECONDS = 240
"""Longest wait of a test; long enough for a slow machine."""


def write_rows(path: Path, count: int = 48, seed: int = 0) -> Path:
    """Write rows with additions of different lengths: `prompt`, `completion`, and the sum as `answer`."""
    random = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            terms = random.integers(0, 100, random.integers(1, 9)).tolist()
            working = " ".join(f"{a}+{b}={a + b}." for a, b in pairwise(terms))
            row = {"prompt": " + ".join(map(str, terms)), "completion": f" {working} #### {sum(terms)}"}
            file.write(json.dumps(row | {"answer": str(sum(terms))}) + "\n")
    return path


def write_tasks(folder: Path, count: int = 24) -> Path:
    """Write the rows of two tasks to `folder`/rows.jsonl; their `options` differ in number and length."""
    words = ["cat", "dog", "mat", "log", "sat"]
    options = [["the log", "no"], ["yes", "no", "the mat and the dog"]]
    random = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            text = " ".join(random.choice(words, random.integers(1, 7)))
            of_task = options[i % 2]
            row = {"prompt": f"{text} {i}", "completion": of_task[i // 2 % len(of_task)], "options": of_task}
            file.write(json.dumps(row | {"task": f"task {i % 2}"}) + "\n")
    return path


def settings(
    folder: Path, student: str, method: str | dict[str, Any] = "supervised", **training: Any
) -> dict[str, Any]:
    """Return the settings of a run in `folder`/run, and write its rows to `folder`.

    It trains in this process unless `workers` is given. Every method but `supervised` uses the served teacher of the
    suite.
    """
    data = folder / "rows.jsonl"
    if not data.exists():
        write_rows(data)
    method = {"kind": method} if isinstance(method, str) else method
    rollouts = {"rollouts": {"max_new_tokens": 12}} if method["kind"] in ("on_policy", "minillm") else {}
    return {
        "output": str(folder / "run"),
        "teachers": [] if method["kind"] == "supervised" else [{"name": "served", "attach": True}],
        "student": {"model": student},
        "data": {"train": {"path": str(data)}},
        "method": method,
        **rollouts,
        "training": {
            "workers": 0, "steps": 6, "batch_size": 8, "learning_rate": 5e-3, "resources": {"num_cpus": 0.5},
            "warmup_steps": 0, "checkpoint_every_steps": 1000, **training,
        },
        "tracking": {"tensorboard": False},
    }  # fmt: skip


def config(folder: Path, student: str, method: str | dict[str, Any] = "supervised", **training: Any) -> RunConfig:
    return parse_config(settings(folder, student, method, **training))


def failing_once(base: type[Method], at: int) -> type[Method]:
    """Return a subclass of a method that stops the run once after step `at`, as if the process were killed."""
    failed: list[int] = []

    class FailsOnce(base):  # type: ignore[misc, valid-type]
        def on_step(self, step: int) -> None:
            super().on_step(step)
            if step == at and not failed:
                failed.append(step)
                raise KeyboardInterrupt

    return FailsOnce


def assert_placement_changes_nothing(
    make: Callable[..., RunConfig], kind: str, at: int, every: int, monkeypatch: Any
) -> Path:
    """Compare a run of method `kind` with one of two workers, and with one that stops once after step `at` and is
    resumed from its last checkpoint; return the directory of the first.

    Args:
        make: returns the config of the run with a name and changes of `training`.
        every: steps between two checkpoints of the run that stops.
    """
    whole, two = make("whole"), make("two", workers=2, micro_batch_tokens=60)
    stopped = make("stopped", checkpoint_every_steps=every)
    distill(whole)
    distill(two)
    monkeypatch.setitem(METHODS, kind, failing_once(METHODS[kind], at))
    try:
        distill(stopped)
        raise AssertionError("the run did not stop")
    except KeyboardInterrupt:
        distill(stopped, resume=True)
    assert_same_learning(whole.output_path, two.output_path)
    assert_same_learning(whole.output_path, stopped.output_path, 1e-6)
    return whole.output_path


def metrics(run: Path | str) -> list[dict[str, Any]]:
    path = Path(run) / "metrics.jsonl"
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def curve(run: Path | str, name: str = "loss") -> list[float]:
    return [row[name] for row in metrics(run)]


def weights(run: Path | str) -> dict[str, np.ndarray]:
    return load_file(Path(run) / "model" / "model.safetensors")


def assert_losses_close(losses: Sequence[float], expected: Sequence[float], tolerance: float = 1e-4) -> None:
    """Compare losses up to a relative `tolerance` and the rounding of float32 log-probs, 1e-6 nats, which is not small
    beside the divergence of a student that has become its teacher."""
    np.testing.assert_allclose(losses, expected, rtol=tolerance, atol=1e-6)


def assert_same_learning(run: Path | str, other: Path | str, tolerance: float = 1e-4) -> None:
    """Compare the losses of all steps and the final weights of two runs; each step must occur once."""
    steps = curve(run, "step")
    assert steps == list(range(1, len(steps) + 1)) == curve(other, "step")
    assert_losses_close(curve(run), curve(other), tolerance)
    first, second = weights(run), weights(other)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_allclose(first[name], second[name], atol=10 * tolerance, err_msg=name)


def wait_until(
    condition: Callable[[], Any], what: str = "a condition", alive: subprocess.Popen | None = None,
    seconds: float = PATIENCE_SECONDS,
) -> Any:  # fmt: skip
    """Wait until `condition()` is true and return its value; fail after `seconds`, or when the process `alive` ends."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert alive is None or alive.poll() is None, f"the process ended with {alive.returncode} before {what}"
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)
    return value


def environment(**changes: str) -> dict[str, str]:
    return (
        os.environ
        | {"PYTHONPATH": str(Path(__file__).parents[1]), "RAY_AUTH_MODE": "disabled", "PYTHONFAULTHANDLER": "1"}
        | changes
    )


@contextmanager
def rayk(*arguments: object, log: Path, **variables: str) -> Iterator[subprocess.Popen]:
    """Start `rayk …` in a separate process group with its output in `log`; kill it at the end if it still runs."""
    command = [sys.executable, "-m", "rayk.cli", *map(str, arguments)]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=environment(**variables), start_new_session=True
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGABRT)  # makes faulthandler print the stack of each thread
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        print(log.read_text(errors="replace"))  # shown if the test fails


def run_rayk(*arguments: object, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "rayk.cli", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment(**variables), timeout=PATIENCE_SECONDS, check=False
    )


def processes(**having: str) -> list[psutil.Process]:
    """Return the processes that were started with these environment variables."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if having.items() <= process.environ().items() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def actor_processes(title: str, below: int | None = None) -> list[psutil.Process]:
    """Return the processes of Ray actors whose class name starts with `title`: those of the clusters that this process
    has started, or those of one node.

    Args:
        below: number of the node's `ray start`.
    """
    found = []
    for process in psutil.Process(below).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(f"ray::{title}"):
                found.append(process)
    return found
