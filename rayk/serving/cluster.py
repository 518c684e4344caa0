"""The Ray cluster of this process: the one RAY_ADDRESS names (as in a submitted job), else one of its own."""

import logging
import os
import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import ray

from rayk.config import Resources
from rayk.environment import THREADING, set_threading

_LOCAL_OBJECT_STORE_BYTES = 1 << 30
T = TypeVar("T")
_own_address: str | None = None


def start_ray(num_cpus: float = 0) -> None:
    """Connect to Ray unless this process already is.

    A cluster of this process's own gets at least `num_cpus` logical CPUs: on a laptop a run that asks for more than
    there are should be slow, not wait for ever.
    """
    # Train's controller looks at its workers only so often: by default every other second, which each start waits for.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    if ray.is_initialized():
        return
    verbose = os.environ.get("RAYK_VERBOSE", "") not in ("", "0")
    common: dict[str, Any] = {
        "log_to_driver": verbose,
        "logging_level": logging.INFO if verbose else logging.ERROR,
    }
    if not verbose:
        for name in ("ray", "ray.serve", "ray.train", "ray.data"):
            logging.getLogger(name).setLevel(logging.ERROR)
    own = not os.environ.get("RAY_ADDRESS")
    if own:
        set_threading()  # all its processes have this one's variables
        # Train would start an actor with each group of workers that asks whether nodes are about to be taken away.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        os.environ.setdefault("RAY_WARN_BLOCKING_GET_INSIDE_ASYNC", "0")  # Train's controller does so
        common |= {
            "address": "local",
            "num_cpus": max(os.cpu_count() or 1, int(num_cpus + 0.999)),
            "object_store_memory": _LOCAL_OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
    else:
        common |= {"runtime_env": {"env_vars": THREADING}}
    ours = signal.getsignal(signal.SIGTERM)
    ray.init(**common)
    if own:
        global _own_address
        _own_address = ray.get_runtime_context().gcs_address
    if threading.current_thread() is threading.main_thread():
        # Ray's native handler aborts the process three seconds after SIGTERM, whatever is still to be taken down.
        signal.signal(signal.SIGTERM, ours if callable(ours) else signal.getsignal(signal.SIGTERM))


def is_own_cluster() -> bool:
    """Whether this process has started its cluster, by `start_ray`, and takes it down when it ends."""
    return ray.is_initialized() and ray.get_runtime_context().gcs_address == _own_address


def gpus_per_worker(requested: float | None, needed: float = 1.0) -> float:
    """GPUs for one replica or worker: as requested, else `needed` if the cluster has any."""
    if requested is not None:
        return requested
    return needed if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0


def run_on(resources: Resources, work: Callable[..., T], *arguments: Any) -> T:
    """What `work` returns, run as a task with these resources somewhere on the cluster.

    Raises:
        Whatever it raises.
    """
    task = ray.remote(work).options(
        num_cpus=resources.num_cpus, num_gpus=gpus_per_worker(resources.num_gpus), resources=resources.custom
    )
    try:
        return ray.get(task.remote(*arguments))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
