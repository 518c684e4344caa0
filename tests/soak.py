"""Runs under a random killer: their curves and weights must equal those of a run that nothing disturbs.

    python -m tests.soak --minutes 20
    python -m tests.soak --minutes 10 --steps 1000 --engine vllm

A cluster of three nodes on this machine: the head, one node for teachers, one for students. After each fault and its
recovery a random part is killed: a teacher's replica (with `--engine vllm` vLLM's process instead), a training worker,
a node with all that runs on it, or the driver, which is then started again with --resume. Runs follow each other until
the time is over. At the end a table, for deploy/README.md, says what happened after each kind of fault.
"""

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.clusters import LocalCluster
from tests.runs import PATIENCE_SECONDS, actor_processes, assert_same_learning, environment, metrics, settings
from tests.tiny import tiny_model, tiny_tokenizer

CHECKPOINT_EVERY = 25
BEYOND = 5
"""A run has recovered when it is this number of steps further than at the fault; fewer may have been prepared
before."""
NODE_GONE_SECONDS = 5.0
TEACHERS: dict[str, dict[str, Any]] = {
    "transformers": {"replicas": 2},
    # float32, because the batches in which vLLM computes a row differ; one replica, because it has a second process.
    "vllm": {"engine": {"kind": "vllm", "dtype": "float32", "arguments": {"enforce_eager": True}}, "replicas": 1},
}
TOLERANCE = 1e-3
"""Largest relative difference of losses: two workers sum gradients in another order than one."""


@dataclass
class Recovery:
    """The consequences of a fault."""

    lost: int
    """Steps that were computed again."""
    seconds: float
    """Until the run was `BEYOND` steps further than at the fault."""


@dataclass
class Table:
    """The recoveries of each kind of fault."""

    recoveries: dict[str, list[Recovery]] = field(default_factory=lambda: defaultdict(list))

    def lines(self) -> list[str]:
        rows = ["| killed | times | what happened | steps lost | seconds to recover |", "|---|---|---|---|---|"]
        for name, found in self.recoveries.items():
            lost, seconds = ([getattr(each, what) for each in found] for what in ("lost", "seconds"))
            rows.append(
                f"| {name} | {len(found)} | {FAULTS[name].effect} | {_median_and_most(lost)} | "
                f"{_median_and_most(seconds)} |"
            )
        return rows


def _median_and_most(values: list[Any]) -> str:
    return f"{statistics.median(values):.0f} (at most {max(values):.0f})"


class Soak:
    """The cluster, and one run on it at a time."""

    def __init__(self, cluster: LocalCluster, folder: Path, steps: int, engine: str):
        self._cluster, self._folder = cluster, folder
        tokenizer = tiny_tokenizer()
        hidden = 128 if engine == "vllm" else 32  # vLLM supports few sizes of attention heads
        # vLLM computes the padding's logits, too, and rayk refuses a teacher that prefers them.
        tiny_model(
            folder / "teacher", vocab_size=len(tokenizer), seed=1, hidden=hidden, peaked=4.0, tokenizer=tokenizer
        )
        tiny_model(folder / "student", seed=2, hidden=16, layers=1, tokenizer=tiny_tokenizer())
        values = settings(
            folder, str(folder / "student"), "logit_kd", workers=2, steps=steps, batch_size=16, learning_rate=1e-3,
            checkpoint_every_steps=CHECKPOINT_EVERY, max_failures=-1,
        )  # fmt: skip
        values["training"]["resources"] = {"num_cpus": 0.5, "labels": {"rayk/group": "trainer"}}
        resources = {"num_cpus": 0.5, "labels": {"rayk/group": "teacher"}}
        model = str(folder / "teacher")
        values["teachers"] = [{"name": "soak", "model": model, "resources": resources} | TEACHERS[engine]]
        self._config = folder / "run.yaml"
        self._config.write_text(yaml.safe_dump(values))
        self._driver: subprocess.Popen[bytes] | None = None
        self.output = folder

    def begin(self, name: str) -> None:
        """Start a new run."""
        self.output = self._folder / name
        self._start_driver()

    def reached(self) -> int:
        """Return the last step of the run."""
        return max((row["step"] for row in metrics(self.output)), default=0)

    def is_finished(self, *, restarts: bool = True) -> bool:
        """Return whether the run is finished. If its driver has ended with an error, start it again, or exit with its
        log unless it `restarts`."""
        assert self._driver is not None
        if self._driver.poll() is None:
            return False
        if self._driver.returncode == 0:
            return True
        if not restarts:
            raise SystemExit(f"The run ended with {self._driver.returncode}:\n{self._log.read_text()}")
        print(f"    the driver ended with {self._driver.returncode}, and is started again", flush=True)
        self._start_driver()
        return False

    def disturb(self, strike: Callable[["Soak"], None]) -> Recovery | None:
        """Strike, and wait for the recovery; None if the run was finished before."""
        before, inode = self.reached(), _inode(self.output)
        began = time.monotonic()
        strike(self)
        lost = 0
        while not self.is_finished():
            if _inode(self.output) != inode:  # it was cut back to a checkpoint
                inode = _inode(self.output)
                lost = max(lost, before - self.reached())
            if self.reached() >= before + BEYOND:
                return Recovery(lost, time.monotonic() - began)
            if time.monotonic() - began > PATIENCE_SECONDS:
                raise SystemExit(f"The run in {self.output} did not recover; see {self._log}.")
            time.sleep(0.05)
        return None

    def kill_process(self, title: str) -> None:
        found = [process for node in self._cluster.nodes.values() for process in actor_processes(title, node.pid)]
        if found:
            random.choice(found).kill()

    def kill_engine(self) -> None:
        """Kill a process of vLLM below one of the replicas."""
        replicas = [each for node in self._cluster.nodes.values() for each in actor_processes("ServeReplica", node.pid)]
        found = [child for replica in replicas for child in replica.children() if "EngineCore" in child.name()]
        if found:
            random.choice(found).kill()

    def kill_node(self, name: str) -> None:
        self._cluster.kill_node(name)
        time.sleep(NODE_GONE_SECONDS)
        self._cluster.start_node(name, cpus=4, labels={"rayk/group": name})

    def kill_driver(self) -> None:
        assert self._driver is not None
        os.killpg(self._driver.pid, signal.SIGKILL)
        self._driver.wait()
        self._start_driver()

    def close(self) -> None:
        if self._driver is not None and self._driver.poll() is None:
            os.killpg(self._driver.pid, signal.SIGKILL)
            self._driver.wait()

    @property
    def _log(self) -> Path:
        return self._folder / f"{self.output.name}.log"

    def _start_driver(self) -> None:
        command = [
            sys.executable, "-m", "rayk.cli", "run", str(self._config), "--output", str(self.output), "--resume",
        ]  # fmt: skip
        with self._log.open("ab") as log:
            self._driver = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment(RAY_ADDRESS=self._cluster.address),
                start_new_session=True,
            )  # fmt: skip


def _inode(output: Path) -> int:
    """Return the number of the metrics file, which is replaced when workers start."""
    file = output / "metrics.jsonl"
    return file.stat().st_ino if file.exists() else 0


@dataclass(frozen=True)
class Fault:
    """A kind of fault.

    Attributes:
        engine: the teachers' engine, if it occurs only with that one.
    """

    strike: Callable[[Soak], None]
    effect: str
    engine: str | None = None


FAULTS = {
    "a teacher's replica": Fault(
        lambda soak: soak.kill_process("ServeReplica:soak"), "its calls go to the other replica", "transformers"
    ),
    "vLLM's process": Fault(Soak.kill_engine, "calls wait until a new replica has loaded the teacher", "vllm"),
    "a training worker": Fault(
        lambda soak: soak.kill_process("RayTrainWorker"), "Ray Train starts both workers again from the checkpoint"
    ),
    "the teachers' node": Fault(
        lambda soak: soak.kill_node("teacher"), "calls wait until a new node has loaded the teacher"
    ),
    "the students' node": Fault(
        lambda soak: soak.kill_node("trainer"), "Ray Train waits for a new node, then starts from the checkpoint"
    ),
    "the driver": Fault(Soak.kill_driver, "`--resume` takes the teachers over and starts from the checkpoint"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20, help="of disturbed runs; the last one is finished")
    parser.add_argument("--steps", type=int, default=2000, help="of each run")
    parser.add_argument("--seed", type=int, default=0, help="of the killer")
    parser.add_argument("--folder", type=Path, help="for the runs; by default a temporary one")
    parser.add_argument("--engine", choices=TEACHERS, default="transformers", help="of the teachers")
    given = parser.parse_args()
    random.seed(given.seed)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the cluster is ended
    with tempfile.TemporaryDirectory(prefix="soak") as temporary, LocalCluster() as cluster:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        cluster.start_head(cpus=2)
        for group in ("teacher", "trainer"):
            cluster.start_node(group, cpus=4, labels={"rayk/group": group})
        soak = Soak(cluster, folder, given.steps, given.engine)
        try:
            _soak(soak, given.minutes, [name for name, fault in FAULTS.items() if fault.engine in (None, given.engine)])
        finally:
            soak.close()


def _soak(soak: Soak, minutes: float, kinds: list[str]) -> None:
    soak.begin("undisturbed")
    began = time.monotonic()
    while not soak.is_finished(restarts=False):
        time.sleep(0.2)
    undisturbed = soak.output
    print(f"Undisturbed: {soak.reached():,} steps in {time.monotonic() - began:.0f} s.", flush=True)
    table, began, runs = Table(), time.monotonic(), 0
    faults: list[str] = []
    while time.monotonic() - began < 60 * minutes:
        runs += 1
        soak.begin(f"disturbed-{runs}")
        while not soak.is_finished():
            if soak.reached() < 1 or time.monotonic() - began > 60 * minutes:
                time.sleep(0.1)
                continue
            time.sleep(random.uniform(0.5, 5.0))
            faults = faults or random.sample(kinds, len(kinds))  # so that each kind comes as often
            name = faults.pop()
            if recovery := soak.disturb(FAULTS[name].strike):
                table.recoveries[name].append(recovery)
                print(f"  {name}: {recovery.lost} steps lost, {recovery.seconds:.1f} s", flush=True)
        assert_same_learning(undisturbed, soak.output, TOLERANCE)
        print(f"Run {runs}: each of {soak.reached():,} steps once, and the same losses and weights.", flush=True)
    faults_seen = sum(map(len, table.recoveries.values()))
    print(f"\n{faults_seen} faults in {runs} runs and {(time.monotonic() - began) / 60:.0f} minutes:\n")
    print("\n".join(table.lines()))


if __name__ == "__main__":
    main()
