"""Start, place, inspect and remove the Serve applications that hold teachers and policies."""

import logging
from typing import Any

import ray
from ray import serve
from ray.serve.schema import ReplicaState

from rayk.config import Replicas, Resources
from rayk.environment import THREADING
from rayk.errors import InputError
from rayk.serving.cluster import gpus_per_worker, is_own_cluster

logger = logging.getLogger(__name__)

DEPLOYMENT = "teacher"
"""Its name in a teacher's application, and in the policy's (`rayk.rollouts.served`)."""

# Far above what credit-bound clients keep open; at Serve's default of 5 its router probes full replicas again and
# again, and 200 calls in flight ran ten times slower than one by one (PLATFORM §4).
_MAX_ONGOING_REQUESTS = 1000

_HEALTH_CHECK_SECONDS = 5.0  # Serve replaces a replica after the third failed one

_START_ATTEMPTS = 2

_REPORT_SECONDS = 10.0  # how often Serve's autoscaler hears of a replica's load

_LOOK_BACK_SECONDS = 10.5  # what it averages over; Serve wants more than the former


def start_application(
    name: str, replica: type, settings: dict, replicas: Replicas, resources: Resources, *, gpus: float, what: str,
    across_nodes: bool = False,
) -> None:  # fmt: skip
    """Start Serve application `name`, so many copies of `replica(settings)`, and wait until every one stands.

    Args:
        replica: reports waiting tokens for autoscaling, as `TeacherReplica` does.
        gpus: what each needs, where `resources` does not say and the cluster has any.
        what: how errors and warnings call it.
        across_nodes: the GPUs of one may lie on several nodes.

    Raises:
        InputError: they do not start.
    """
    serve.start(proxy_location="Disabled")
    gpus = gpus_per_worker(resources.num_gpus, gpus)
    options: dict[str, Any] = {
        **placement(resources, gpus, across_nodes),
        "name": DEPLOYMENT,
        "max_ongoing_requests": _MAX_ONGOING_REQUESTS,
        "health_check_period_s": _HEALTH_CHECK_SECONDS,
        "graceful_shutdown_timeout_s": 5,
        "graceful_shutdown_wait_loop_s": 0.2,
        "max_constructor_retry_count": _START_ATTEMPTS,
    }
    if replicas.min == replicas.max:
        options["num_replicas"] = replicas.min
    else:
        options["autoscaling_config"] = {
            "min_replicas": replicas.min,
            "initial_replicas": max(1, replicas.min),  # the model is to be seen to load
            "max_replicas": replicas.max,
            "metrics_interval_s": _REPORT_SECONDS,
            "look_back_period_s": _LOOK_BACK_SECONDS,
            "upscale_delay_s": replicas.up_seconds,
            "downscale_delay_s": replicas.down_seconds,
            "policy": {
                "policy_function": "rayk.serving.autoscaling:WaitingTokensPolicy",
                "policy_kwargs": {"tokens_a_replica": replicas.waiting_tokens},
            },
        }
    _warn_where_short(what, replicas.min, {"CPU": resources.num_cpus, "GPU": gpus, **resources.custom})
    application = serve.deployment(replica).options(**options).bind(settings)
    try:
        serve.run(application, name=name, route_prefix=None, logging_config={"log_level": "WARNING"})
    except RuntimeError as error:
        reason = failure_reason(name) or str(error)
        raise InputError(f"{what} did not start: {reason}") from error


def placement(resources: Resources, gpus: float, across_nodes: bool) -> dict[str, Any]:
    """Serve's options that say where a replica stands.

    Args:
        gpus: of one replica.
        across_nodes: a bundle for each of them, on as few nodes as it takes. The replica is in the first with its CPUs
            and custom resources, and holds no GPU itself, so that what it starts in the group can have them all.
    """
    grouped = across_nodes and gpus >= 1
    actor = {
        "num_cpus": resources.num_cpus, "num_gpus": 0.0 if grouped else gpus, "resources": resources.custom,
        "runtime_env": {} if is_own_cluster() else {"env_vars": THREADING},
    }  # fmt: skip
    if not grouped:
        return {"ray_actor_options": actor}
    first = {"CPU": resources.num_cpus, "GPU": 1.0, **resources.custom}
    bundles = [first, *({"GPU": 1.0} for _ in range(int(gpus) - 1))]
    return {"ray_actor_options": actor, "placement_group_bundles": bundles, "placement_group_strategy": "PACK"}


def _warn_where_short(what: str, replicas: int, needs: dict[str, float]) -> None:
    """Say what the cluster lacks: Serve waits for it without a word, rightly so where a cluster grows on demand."""
    there = ray.cluster_resources()
    for name, each in needs.items():
        if each * replicas > there.get(name, 0):
            logger.warning(
                "%s asks for %g %s in all, but the cluster has %g now: waiting until it has more.",
                what, each * replicas, name, there.get(name, 0),
            )  # fmt: skip


def failure_reason(name: str) -> str:
    """Why application `name` is not healthy, as its replicas said it; empty when nothing is known."""
    application = serve.status().applications.get(name)
    if application is None:
        return ""
    texts = [application.message, *(d.message for d in application.deployments.values())]
    for text in texts:
        for line in reversed(text.splitlines()):
            if "Error: " in line:
                return line.split("Error: ", 1)[1].strip()
    return ""


def count_replicas(name: str) -> int:
    """How many replicas of application `name` run."""
    application = serve.status().applications.get(name)
    deployments = application.deployments if application else {}
    return sum(d.replica_states.get(ReplicaState.RUNNING, 0) for d in deployments.values())


def remove(name: str) -> None:
    """Take application `name` down; nothing happens where it does not exist."""
    serve.delete(name)
