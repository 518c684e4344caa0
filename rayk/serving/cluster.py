"""Connect to the Ray cluster that RAY_ADDRESS names (as in a submitted job), or start a local one."""

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray

from rayk.config import Resources
from rayk.environment import THREADING, set_threading
from rayk.errors import InputError, RunFailed

CONNECT_SECONDS = 10.0
"""Longest time to wait for the cluster at RAY_ADDRESS to accept a connection."""

LOCAL_START_ATTEMPTS = 2
"""Number of times that the start of a local cluster is tried."""

_LOCAL_OBJECT_STORE_BYTES = 1 << 30
_CLUSTER_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
T = TypeVar("T")
_own_address: str | None = None


def start_ray(num_cpus: float = 0) -> None:
    """Connect to Ray unless this process is already connected.

    A local cluster gets at least `num_cpus` logical CPUs, even on a smaller machine: a run that requests more CPUs than
    the machine has should be slow instead of waiting forever.

    Raises:
        InputError: no cluster answers at RAY_ADDRESS within `CONNECT_SECONDS`.
    """
    # Ray Train polls its workers every 2 s by default, which delays every start by up to that time.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # A worker that hangs (SIGSTOP, a frozen node) is replaced after this time, by default after ten minutes.
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "180")
    if ray.is_initialized():
        return
    verbose = os.environ.get("RAYK_VERBOSE", "") not in ("", "0")
    options: dict[str, Any] = {
        "log_to_driver": verbose,
        "logging_level": logging.INFO if verbose else logging.ERROR,
    }
    if not verbose:
        for name in ("ray", "ray.serve", "ray.train", "ray.data"):
            logging.getLogger(name).setLevel(logging.ERROR)
    address = os.environ.get("RAY_ADDRESS")
    local = not address or address == "local"
    if local:
        set_threading()  # every process of the cluster inherits these variables
        # Ray Train would start an actor per worker group that watches for the preemption of nodes.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        os.environ.setdefault("RAY_WARN_BLOCKING_GET_INSIDE_ASYNC", "0")  # Ray Train's controller causes this warning
        options |= {
            "address": "local",
            "num_cpus": max(os.cpu_count() or 1, int(num_cpus + 0.999)),
            "object_store_memory": _LOCAL_OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
    else:
        check_address(str(address))
        options |= {"runtime_env": {"env_vars": threading_variables()}}
    own_handler = signal.getsignal(signal.SIGTERM)
    try:
        if local:
            _start_local_cluster(options)
        else:
            with _on_loopback() if _is_loopback_only(str(address)) else nullcontext():
                ray.init(**options)
    except ConnectionError as error:
        raise InputError(_no_cluster(address)) from error
    if local:
        global _own_address
        _own_address = ray.get_runtime_context().gcs_address
        _protect_token()
    if threading.current_thread() is threading.main_thread():
        # Ray's native handler aborts the process 3 s after SIGTERM, even while applications are being removed.
        signal.signal(signal.SIGTERM, own_handler if callable(own_handler) else signal.getsignal(signal.SIGTERM))


def _start_local_cluster(options: dict[str, Any]) -> None:
    """Call `ray.init` for a local cluster, a second time if the first start times out.

    Ray 2.60 stops a node whose agent is not ready after 15 s (ray-project/ray#65983), which a busy machine exceeds.

    Raises:
        RunFailed: every start timed out.
    """
    shows_ray = options["logging_level"] < logging.ERROR
    for attempt in range(1, LOCAL_START_ATTEMPTS + 1):
        try:
            with _separate_process_groups(), _on_loopback():
                # Ray's own errors recommend a bug report to Ray, before this function can say what to do.
                ray.init(**options | ({} if shows_ray else {"logging_level": logging.CRITICAL}))
            logging.getLogger("ray").setLevel(options["logging_level"])
            return
        except Exception as error:  # Ray raises no narrower type
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            if attempt == LOCAL_START_ATTEMPTS:
                raise RunFailed(
                    f"Ray did not start on this machine in {attempt} attempts, probably because other programs use its "
                    "CPUs or memory; end some of them and try again. Ray's logs are in "
                    f"/tmp/ray/session_*_{os.getpid()}/logs."
                ) from error


@contextmanager
def _separate_process_groups() -> Iterator[None]:
    """Let Ray start each of its processes in a process group of its own, out of reach of signals to this process' group
    (`timeout`, some schedulers).

    Otherwise SIGTERM ends the cluster before the run is checkpointed and its applications are removed. The processes
    still end with this one. Where Ray has renamed the private class, they stay in this process' group.
    """
    from ray._private import services

    popen = getattr(services, "ConsolePopen", None)
    if popen is None:
        yield
        return
    services.ConsolePopen = partial(popen, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = popen


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Let Ray use the address 127.0.0.1 in the block: its processes then listen on no other interface of the machine.

    Ray does so on Windows and macOS, and elsewhere if a variable says so, which its processes inherit. The variable's
    value "1" lets other machines connect.
    """
    before = os.environ.get(_CLUSTER_VARIABLE)
    if before == "1":
        yield
        return
    from ray._private import ray_constants  # has read the variable when Ray was imported

    enabled = getattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    ray_constants.ENABLE_RAY_CLUSTER, os.environ[_CLUSTER_VARIABLE] = False, "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = enabled
        os.environ.pop(_CLUSTER_VARIABLE)
        if before is not None:
            os.environ[_CLUSTER_VARIABLE] = before


def _is_loopback_only(address: str) -> bool:
    """Return whether the cluster at this address listens on 127.0.0.1, but not on the machine's own address, which Ray
    uses in place of it."""
    host, _, port = address.rpartition(":")
    if host not in ("127.0.0.1", "localhost") or not port.isdigit():
        return False
    try:
        socket.create_connection((ray.util.get_node_ip_address(), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError:
        return True
    return False


def _protect_token() -> None:
    """Let only this user read the token of Ray's authentication, which Ray 2.60 writes for everyone."""
    with suppress(OSError, RuntimeError):  # there is none, or no home folder
        (Path.home() / ".ray" / "auth_token").chmod(0o600)


def check_address(address: str) -> None:
    """Check that a server listens at a Ray address (`HOST:PORT` or `ray://HOST:PORT`); `ray.init` would wait minutes.

    Raises:
        InputError: nothing listens there within `CONNECT_SECONDS`.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # such as "auto": Ray finds the address itself
    deadline = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            remaining = max(0.1, deadline - time.monotonic())
            socket.create_connection((host.strip("[]"), int(port)), timeout=remaining).close()
            return
        except OSError as error:
            if time.monotonic() + 0.5 > deadline:
                raise InputError(_no_cluster(address)) from error
            time.sleep(0.5)


def _no_cluster(address: str | None) -> str:
    return (
        f"No Ray cluster answers at RAY_ADDRESS '{address}' within {CONNECT_SECONDS:g} s; set RAY_ADDRESS to a running "
        "cluster, or unset it to use a local cluster of this process."
    )


def cluster_variables() -> dict[str, str]:
    """Return the environment variables with which another process on this machine connects to this cluster."""
    mode = os.environ.get("RAY_AUTH_MODE")
    return {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, **({"RAY_AUTH_MODE": mode} if mode else {})}


def threading_variables() -> dict[str, str]:
    """Return the variables of `THREADING` for processes on a cluster, without those that the runtime environment of the
    submitted job sets: these have the user's values, and `ray.init` refuses a variable that is given twice."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    given = (job.get("runtime_env") or {}).get("env_vars") or {}
    return {name: value for name, value in THREADING.items() if name not in given}


def is_own_cluster() -> bool:
    """Return whether this process started its cluster with `start_ray`; such a cluster ends with the process."""
    return ray.is_initialized() and ray.get_runtime_context().gcs_address == _own_address


def gpus_per_worker(requested: float | None, needed: float = 1.0) -> float:
    """Return the number of GPUs of one replica or worker: `requested` if it is set; else `needed`, or 0 on a cluster
    without GPUs."""
    if requested is not None:
        return requested
    return needed if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0


def run_on(resources: Resources, work: Callable[..., T], *arguments: Any) -> T:
    """Run `work` as a Ray task with these resources and return its result.

    Raises:
        Exception: the exception that `work` raises.
    """
    task = ray.remote(work).options(
        num_cpus=resources.num_cpus, num_gpus=gpus_per_worker(resources.num_gpus), resources=resources.custom,
        label_selector=resources.labels or None,
    )  # fmt: skip
    try:
        return ray.get(task.remote(*arguments))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error


def is_job_running(job_id: str) -> bool:
    """Return whether the driver of Ray job `job_id` is still running; True if Ray's job table cannot be read."""
    try:
        from ray._private.state import jobs

        return any(job["JobID"] == job_id and not job["IsDead"] for job in jobs())
    except (ImportError, KeyError):  # `jobs` is private and may change with the version of Ray
        return True
