"""Start, place, inspect and remove Ray Serve applications, each with the replicas of one model."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray import serve
from ray.serve.schema import ReplicaState

from rayk.config import Replicas, Resources
from rayk.errors import InputError
from rayk.serving.cluster import gpus_per_worker, is_own_cluster, threading_variables

logger = logging.getLogger(__name__)

DEPLOYMENT = "teacher"
"""Name of the only deployment of each application, a teacher's or a policy's; clients find it by this name."""

# Far above the number of calls that requesters with credit keep open. With Serve's default of 5, its router repeatedly
# polls replicas that are at the limit: 200 concurrent calls took ten times longer than the same calls in sequence.
_MAX_ONGOING_REQUESTS = 1000

# Serve replaces a replica after three failed checks, so one that hangs after a minute.
_HEALTH_CHECK_SECONDS = 5.0
_HEALTH_CHECK_TIMEOUT_SECONDS = 15.0

_START_ATTEMPTS = 2

_SERVE_ATTEMPTS = 20

_SERVE_WAIT_SECONDS = 0.5

_LOADING_REPORT_SECONDS = 30.0

_REPORT_SECONDS = 10.0  # interval at which replicas report their load to Serve's autoscaler

_LOOK_BACK_SECONDS = 10.5  # window over which the autoscaler averages; must be longer than the report interval


def start_serve() -> None:
    """Start Serve on the cluster, if it does not run yet."""
    for _ in range(_SERVE_ATTEMPTS - 1):
        try:
            serve.start(proxy_location="Disabled")
        except ray.exceptions.ActorAlreadyExistsError:  # another run is starting it at this moment
            time.sleep(_SERVE_WAIT_SECONDS)
        else:
            return
    serve.start(proxy_location="Disabled")


def start_application(
    name: str, replica: type, settings: dict, replicas: Replicas, resources: Resources, *, gpus: float, label: str,
    across_nodes: bool = False,
) -> None:  # fmt: skip
    """Start Serve application `name` with replicas `replica(settings)` and wait until all are ready.

    Args:
        replica: a class that reports `rayk.serving.autoscaling.METRIC` in `record_autoscaling_stats`.
        gpus: GPUs of each replica if `resources` does not set them and the cluster has GPUs.
        label: name of the application in errors and warnings.
        across_nodes: allow the GPUs of one replica to be on several nodes.

    Raises:
        InputError: the replicas do not start.
    """
    start_serve()
    gpus = gpus_per_worker(resources.num_gpus, gpus)
    _warn_of_missing_resources(label, replicas.min, {"CPU": resources.num_cpus, "GPU": gpus, **resources.custom})
    application = bind_application(replica, settings, replicas, resources, gpus=gpus, across_nodes=across_nodes)
    try:
        with _reports_of_loading(name, label, max(1, replicas.min)):
            serve.run(application, name=name, route_prefix=None, logging_config={"log_level": "WARNING"})
    except RuntimeError as error:
        reason = failure_reason(name) or str(error)
        raise InputError(f"{label} did not start: {reason}") from error


@contextmanager
def _reports_of_loading(name: str, label: str, replicas: int) -> Iterator[None]:
    """Log regularly how many of the `replicas` are ready, while the block waits for them: large models take minutes."""
    ready, started = threading.Event(), time.monotonic()

    def report() -> None:
        while not ready.wait(_LOADING_REPORT_SECONDS):
            with suppress(ray.exceptions.RayError):  # Serve is busy or gone; `serve.run` says so
                logger.warning(
                    "%s: %d of %d replicas are ready after %.0f s. %s",
                    label, count_replicas(name), replicas, time.monotonic() - started, _progress_message(name),
                )  # fmt: skip

    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield
    finally:
        ready.set()
        reporter.join()


def bind_application(
    replica: type, settings: dict, replicas: Replicas, resources: Resources, *, gpus: float, across_nodes: bool = False
) -> serve.Application:
    """Return the application with replicas `replica(settings)`, which is not started yet.

    Args:
        gpus: GPUs of each replica.
        across_nodes: allow the GPUs of one replica to be on several nodes.
    """
    options: dict[str, Any] = {
        **placement_options(resources, gpus, across_nodes),
        "name": DEPLOYMENT,
        "max_ongoing_requests": _MAX_ONGOING_REQUESTS,
        "health_check_period_s": _HEALTH_CHECK_SECONDS,
        "health_check_timeout_s": _HEALTH_CHECK_TIMEOUT_SECONDS,
        "graceful_shutdown_timeout_s": 5,
        "graceful_shutdown_wait_loop_s": 0.2,
        "max_constructor_retry_count": _START_ATTEMPTS,
    }
    if replicas.min == replicas.max:
        options["num_replicas"] = replicas.min
    else:
        options["autoscaling_config"] = {
            "min_replicas": replicas.min,
            "initial_replicas": max(1, replicas.min),  # so that a model that cannot be loaded raises here
            "max_replicas": replicas.max,
            "metrics_interval_s": _REPORT_SECONDS,
            "look_back_period_s": _LOOK_BACK_SECONDS,
            "upscale_delay_s": replicas.up_seconds,
            "downscale_delay_s": replicas.down_seconds,
            "policy": {
                "policy_function": "rayk.serving.autoscaling:WaitingTokensPolicy",
                "policy_kwargs": {"tokens_per_replica": replicas.waiting_tokens},
            },
        }
    return serve.deployment(replica).options(**options).bind(settings)


def placement_options(resources: Resources, gpus: float, across_nodes: bool) -> dict[str, Any]:
    """Return Serve's deployment options that place one replica.

    Args:
        gpus: GPUs of one replica.
        across_nodes: use a placement group with a bundle per GPU on as few nodes as possible. The replica itself is in
            the first bundle, with its CPUs and custom resources but no GPU: the engine's processes use all GPUs.
    """
    grouped = across_nodes and gpus >= 1
    actor = {
        "num_cpus": resources.num_cpus, "num_gpus": 0.0 if grouped else gpus, "resources": resources.custom,
        "runtime_env": {} if is_own_cluster() else {"env_vars": threading_variables()},
    }  # fmt: skip
    if resources.labels and not grouped:
        actor["label_selector"] = resources.labels
    if not grouped:
        return {"ray_actor_options": actor}
    first = {"CPU": resources.num_cpus, "GPU": 1.0, **resources.custom}
    bundles = [first, *({"GPU": 1.0} for _ in range(int(gpus) - 1))]
    placed = {"ray_actor_options": actor, "placement_group_bundles": bundles, "placement_group_strategy": "PACK"}
    return placed | ({"placement_group_bundle_label_selector": [resources.labels]} if resources.labels else {})


def _warn_of_missing_resources(label: str, replicas: int, needs: dict[str, float]) -> None:
    """Log a warning if the cluster lacks the resources of `replicas` replicas, for which Serve waits without a message.

    This is not an error, because a cluster with node autoscaling may add the resources.

    Args:
        needs: amount of each resource for one replica, by the resource's name.
    """
    available = ray.cluster_resources()
    for name, need in needs.items():
        if need * replicas > available.get(name, 0):
            logger.warning(
                "%s requires %g %s in total, but the cluster has %g now: waiting until it has more.",
                label, need * replicas, name, available.get(name, 0),
            )  # fmt: skip


def _progress_message(name: str) -> str:
    """Return why replicas of application `name` are not ready, as far as Serve says so; a failure without its
    traceback."""
    if reason := failure_reason(name):
        return f"A replica failed to start, and Serve starts another one: {reason}"
    application = serve.status().applications.get(name)
    messages = [deployment.message for deployment in application.deployments.values()] if application else []
    return " ".join(" ".join(messages).split()) or "The model is loading."


def failure_reason(name: str) -> str:
    """Return the message of the exception with which replicas of application `name` failed; empty if there is none."""
    application = serve.status().applications.get(name)
    if application is None:
        return ""
    texts = [application.message, *(d.message for d in application.deployments.values())]
    for text in texts:
        for line in reversed(text.splitlines()):
            if "Error: " in line:
                return line.split("Error: ", 1)[1].strip()
    return ""


def count_replicas(name: str, state: ReplicaState = ReplicaState.RUNNING) -> int:
    """Return the number of replicas of application `name` in `state`."""
    application = serve.status().applications.get(name)
    deployments = application.deployments if application else {}
    return sum(d.replica_states.get(state, 0) for d in deployments.values())


def is_loading(name: str) -> bool:
    """Return whether application `name` has no running replica, but one that is starting."""
    return count_replicas(name) == 0 and count_replicas(name, ReplicaState.STARTING) > 0


def remove_application(name: str) -> None:
    """Remove application `name` if it exists."""
    serve.delete(name)
