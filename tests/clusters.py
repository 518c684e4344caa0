"""Ray clusters of one or several nodes on this machine, started by `ray start`, for tests with drivers of their own."""

import contextlib
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

import psutil

from tests.runs import environment, processes, wait_until


def free_ports(count: int) -> list[int]:
    """Return ports of this machine on which nothing listens."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


class LocalCluster(contextlib.ExitStack):
    """A cluster whose nodes are processes; all are killed at the end of the block.

    Attributes:
        address: for RAY_ADDRESS.
        dashboard: for `ray job submit --address`.
        folder: Ray's temporary folder.
        nodes: the process of each node's `ray start`, by the node's name.
    """

    address = dashboard = folder = ""

    def __enter__(self) -> "LocalCluster":
        super().__enter__()
        self.nodes: dict[str, subprocess.Popen] = {}
        self._mark = {"RAYK_TEST_MARK": uuid4().hex}
        # Ray's sockets are in its temporary folder, and their paths are limited to about 100 characters.
        temporary = tempfile.TemporaryDirectory(prefix="rayk", dir="/tmp", ignore_cleanup_errors=True)
        self.folder = self.enter_context(temporary)
        self.callback(self._kill_all)
        return self

    def start_head(self, cpus: int, labels: Mapping[str, str] | None = None) -> None:
        port, dashboard, client = free_ports(3)
        self.address, self.dashboard = f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
        self._start(
            "head", cpus, labels, "--head", f"--port={port}", f"--dashboard-port={dashboard}",
            f"--ray-client-server-port={client}", f"--temp-dir={self.folder}",
        )  # fmt: skip
        wait_until(lambda: _answers(dashboard), "the dashboard", self.nodes["head"])

    def start_node(self, name: str, cpus: int, labels: Mapping[str, str] | None = None) -> None:
        """Start a node, and wait until it has joined the cluster."""
        self._start(name, cpus, labels, f"--address={self.address}")
        log = Path(self.folder) / f"{name}.log"
        wait_until(lambda: "Ray runtime started" in log.read_text(), f"node {name}", self.nodes[name])

    def kill_node(self, name: str) -> None:
        """Kill a node's processes without notice."""
        process = self.nodes.pop(name)
        left = psutil.Process(process.pid).children(recursive=True)
        raylets = [each for each in left if each.name() == "raylet"]
        process.send_signal(signal.SIGKILL)  # it would report the end of the raylet
        for each in (*raylets, *left):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()

    def _start(self, name: str, cpus: int, labels: Mapping[str, str] | None, *options: str) -> None:
        [agent] = free_ports(1)
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats",
            f"--num-cpus={cpus}", f"--object-store-memory={200 << 20}", "--node-ip-address=127.0.0.1",
            f"--dashboard-agent-listen-port={agent}", *options,
        ]  # fmt: skip
        if labels:
            command.append("--labels=" + ",".join(f"{key}={value}" for key, value in labels.items()))
        with open(f"{self.folder}/{name}.log", "wb") as log:
            self.nodes[name] = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment(**self._mark), start_new_session=True
            )

    def _kill_all(self) -> None:
        for process in self.nodes.values():
            process.terminate()
        for left in processes(**self._mark):
            left.kill()
        for process in self.nodes.values():
            process.wait()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
