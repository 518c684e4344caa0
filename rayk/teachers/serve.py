"""Start a teacher on Ray Serve, or connect to one that runs."""

from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.serve.exceptions import RayServeException

from rayk.config import TeacherConfig
from rayk.errors import InputError
from rayk.serving import application as applications
from rayk.serving.cluster import is_own_cluster, start_ray
from rayk.serving.ownership import NOBODY, take_over
from rayk.teachers import deployment
from rayk.teachers.cache import SignalCache
from rayk.teachers.client import Teacher


def connect_teacher(name: str, settings: TeacherConfig | None = None, cache: SignalCache | None = None) -> Teacher:
    """Connect to the teacher that runs as Serve application `name` (started by `rayk serve` or another process).

    Args:
        settings: settings of this client, such as `in_flight` and `deadline_seconds`; by default those with which the
            teacher was deployed.
        cache: stores the signals; by default none.

    Raises:
        InputError: there is no such teacher on this cluster, or no cluster at RAY_ADDRESS.
    """
    start_ray()
    try:
        info, deployed, load_seconds = deployment.call_replica(name, "describe")
    except (KeyError, RayServeException, ray.exceptions.RayError, TimeoutError) as error:
        raise InputError(
            f"No teacher '{name}' answers on this Ray cluster; start it with `rayk serve` and set the RAY_ADDRESS that "
            "it prints, or give the teacher's model instead of 'attach: true'."
        ) from error
    return Teacher(name, info, settings or TeacherConfig.model_validate(deployed), cache, load_seconds)


@contextmanager
def serve_teacher(
    config: TeacherConfig, cache: SignalCache | None = None, *, application: str | None = None
) -> Iterator[Teacher]:
    """Start a teacher on Ray Serve (and Ray, if it does not run), yield its client, and remove the teacher at the end.

    A teacher that another process serves is used and not removed: with `attach: true` it must be running already;
    otherwise one that runs as the same application with the same settings is used instead of a new one. If the process
    that deployed it has been killed, this process takes it over and removes it at the end.

    Args:
        cache: stores the signals; by default none.
        application: name of the Serve application; by default the teacher's name.

    Raises:
        InputError: the teacher cannot be started or reached, or another teacher runs under its name.
    """
    application = application or config.name
    _check_independent(config)
    start_ray(num_cpus=config.resources.num_cpus * config.replicas.max + 1)
    if config.attach:
        yield connect_teacher(application, config, cache)
        return
    running = deployment.is_running(config, application)
    owned = not running or take_over(application, deployment.deployer(application))
    try:
        if not running:
            deployment.deploy(config, application)
        yield connect_teacher(application, config, cache)
    finally:
        if owned:
            applications.remove_application(application)


def detach_teacher(config: TeacherConfig) -> Teacher:
    """Start a teacher on the Ray cluster at RAY_ADDRESS that stays there after the end of this process, and return its
    client; one that was detached before with the same settings is used instead.

    Raises:
        InputError: the teacher cannot be started, or another teacher or another process's runs under its name.
    """
    _check_independent(config)
    start_ray()
    if is_own_cluster():
        raise InputError(
            "A detached teacher needs a Ray cluster that outlives this process; set RAY_ADDRESS to one, such as that "
            "of `ray start --head`."
        )
    if config.attach:
        return connect_teacher(config.name, config)
    if not deployment.is_running(config, config.name):
        deployment.deploy(config, config.name, detached=True)
    elif deployment.deployer(config.name) != NOBODY:
        raise InputError(
            f"Teacher '{config.name}' runs already and ends with the process that has started it; stop that process "
            "first, or choose another name."
        )
    return connect_teacher(config.name, config)


def remove_teacher(name: str) -> None:
    """Remove a detached teacher from the Ray cluster.

    Raises:
        InputError: no such teacher runs, or it belongs to another process.
    """
    connect_teacher(name)
    if deployment.deployer(name) != NOBODY:
        raise InputError(f"Teacher '{name}' ends with the process that has started it; stop that process.")
    applications.remove_application(name)


def _check_independent(config: TeacherConfig) -> None:
    if config.follows is not None:
        raise InputError(
            f"Teacher '{config.name}' follows the student of a run, without which it cannot be served; use `rayk run`, "
            "or leave 'follows' out."
        )
