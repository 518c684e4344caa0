"""A run's Ray Serve applications: their names, deploying the teachers, and the resources that the run requires."""

import hashlib
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import ray

from rayk.config import Resources, RunConfig, TeacherConfig
from rayk.errors import InputError
from rayk.models import weights_fingerprint
from rayk.serving.cluster import is_own_cluster, start_ray
from rayk.teachers import Teacher, connect_teacher, serve_teacher
from rayk.teachers.cache import SignalCache
from rayk.teachers.following import serve_following_teacher


@dataclass(frozen=True)
class Need:
    """The copies of one part of a run, and the resources of each copy."""

    name: str
    least: int
    """Smallest number of copies with which the run can start."""
    most: int
    """Largest number of copies."""
    resources: Resources
    engine_gpus: float = 1.0
    """GPUs of a copy if `resources.num_gpus` is null and the cluster has GPUs."""

    def gpus(self, has_gpus: bool) -> float:
        """Return the GPUs of one copy."""
        if self.resources.num_gpus is not None:
            return self.resources.num_gpus
        return self.engine_gpus if has_gpus else 0.0


def resource_needs(config: RunConfig) -> list[list[Need]]:
    """Return the needs of each phase of a run, the synthesis of rows and the training. All copies of a phase run at the
    same time."""
    teachers = {
        teacher.name: Need(
            f"teacher '{teacher.name}'", max(1, teacher.replicas.min), teacher.replicas.max, teacher.resources,
            teacher.engine.gpus,
        )
        for teacher in config.teachers if not teacher.attach
    }  # fmt: skip
    synthesis = [teachers[name] for name in config.synthesis_teachers if name in teachers]
    served = config.synthesis.served_student if config.synthesis else None
    if served is not None:
        replicas = served.replicas
        synthesis.append(Need("the student", max(1, replicas.min), replicas.max, served.resources, served.engine.gpus))
    training = [need for name, need in teachers.items() if name not in config.synthesis_only_teachers]
    if config.rollouts is not None and (policy := config.rollouts.served) is not None:
        training.append(
            Need("the policy", max(1, policy.replicas.min), policy.replicas.max, policy.resources, policy.engine.gpus)
        )
    least, most = config.training.least_workers, config.training.most_workers
    return [synthesis, [*training, Need("the training workers", least, most, config.training.resources)]]


def requested_cpus(config: RunConfig) -> float:
    """Return the largest number of logical CPUs that workers and replicas use at the same time."""
    return max(sum(need.most * need.resources.num_cpus for need in phase) for phase in resource_needs(config))


def required_cpus(config: RunConfig) -> float:
    """Return the number of logical CPUs that Ray needs for the run: those of workers and replicas, and a spare one."""
    return requested_cpus(config) + 1


def missing_resources(config: RunConfig, cpus: float, gpus: float) -> str | None:
    """Return a sentence on the resources that a cluster of `cpus` CPUs and `gpus` GPUs lacks; None if it has enough."""
    for phase in resource_needs(config):
        needed_cpus = sum(need.least * need.resources.num_cpus for need in phase)
        needed_gpus = sum(need.least * need.gpus(gpus >= 1) for need in phase)
        if needed_gpus > gpus:
            parts = ", ".join(
                f"{need.name} {need.least * need.gpus(gpus >= 1):g}" for need in phase if need.gpus(gpus >= 1)
            )
            return (
                f"The run requires {needed_gpus:g} GPUs at the same time ({parts}), but there are {gpus:g}; lower "
                "resources.num_gpus (fractions share a GPU; 0 computes on CPUs), replicas or training.workers."
            )
        if needed_cpus > cpus:
            parts = ", ".join(f"{need.name} {need.least * need.resources.num_cpus:g}" for need in phase if need.least)
            return (
                f"The run requires {needed_cpus:g} CPUs at the same time ({parts}), but there are {cpus:g}; lower "
                "resources.num_cpus, replicas or training.workers."
            )
    return None


def check_own_cluster(config: RunConfig) -> None:
    """Check that this process's own cluster, to which no nodes are added, has what the run requires.

    Raises:
        InputError: it has fewer GPUs or CPUs than the run requires, so the run would wait for them forever.
    """
    if is_own_cluster():
        found = ray.cluster_resources()
        if missing := missing_resources(config, found.get("CPU", 0.0), found.get("GPU", 0.0)):
            raise InputError(missing)


def describe_shortage(config: RunConfig, nodes: Sequence[Mapping[str, Any]]) -> str | None:
    """Return a sentence on what the run requires and a cluster lacks now, to which nodes may be added; None if it lacks
    nothing. Ray itself would wait without a word.

    Args:
        nodes: the cluster's nodes, as `ray.nodes` returns them.
    """
    living = [node for node in nodes if node["Alive"]]
    cpus, gpus = (sum(node["Resources"].get(name, 0.0) for node in living) for name in ("CPU", "GPU"))
    wait = "It waits until nodes are added."
    if missing := missing_resources(config, cpus, gpus):
        return f"{missing} {wait}"
    for need in itertools.chain(*resource_needs(config)):
        labels = need.resources.labels
        # Other values of a selector, such as in(a,b), are left to Ray.
        is_plain = all(re.fullmatch(r"[\w.-]+", value) for value in labels.values())
        if need.least and is_plain and not any(labels.items() <= node["Labels"].items() for node in living):
            wanted = ", ".join(f"{key}={value}" for key, value in labels.items())
            return f"No node has the labels of {need.name} ({wanted}). {wait}"
    return None


def connect_attached_teachers(config: RunConfig) -> dict[str, Teacher]:
    """Connect to the teachers with `attach: true`, which must be running already.

    Raises:
        InputError: a teacher does not respond.
    """
    names = [teacher.name for teacher in config.teachers if teacher.attach]
    if names:
        start_ray(required_cpus(config))
    return {name: connect_teacher(name) for name in names}


def teacher_applications(config: RunConfig) -> dict[str, str]:
    """Return the name of each teacher's Serve application."""
    return {t.name: t.name if t.attach else f"{t.name}-{_run_hash(config)}" for t in config.teachers}


def policy_application(config: RunConfig) -> str:
    """Return the name of the policy's Serve application; no teacher's name starts with an underscore."""
    return f"_policy-{_run_hash(config)}"


def served_student_config(config: RunConfig) -> TeacherConfig:
    """Return the settings with which the student is served for synthesis.

    The application's name contains the fingerprint of the weights, so that an application that a killed run has left is
    not used with other weights.
    """
    model, served = config.student.model, config.synthesis.served_student if config.synthesis else None
    assert served is not None and model is not None
    return TeacherConfig(
        name=f"{_run_hash(config)}-student-{weights_fingerprint(model)[:8] or 'hub'}", model=model,
        trust_remote_code=config.student.trust_remote_code, chat_template_kwargs=config.data.chat_template_kwargs,
        **dict(served),
    )  # fmt: skip


def _run_hash(config: RunConfig) -> str:
    """Return a hash of the run directory, which is part of the names of the run's own applications.

    So two runs on a cluster do not use each other's applications, and a resumed run finds those that were left when it
    was killed.
    """
    return hashlib.sha256(str(config.output_path).encode()).hexdigest()[:8]


def serve_teachers(
    config: RunConfig, applications: Mapping[str, str], stack: ExitStack, cache: SignalCache | None,
    names: Collection[str] | None = None,
) -> dict[str, Teacher]:  # fmt: skip
    """Deploy the teachers `names` (by default those of training) until `stack` closes; return their clients by name."""
    names = [teacher.name for teacher in config.training_teachers] if names is None else names
    running: dict[str, Teacher] = {}
    for teacher in config.teachers:
        if teacher.name in names:
            application = applications[teacher.name]
            if teacher.follows is not None:
                running[teacher.name] = stack.enter_context(serve_following_teacher(teacher, config, application))
                continue
            served = serve_teacher(teacher, cache if teacher.gives_signals else None, application=application)
            running[teacher.name] = stack.enter_context(served)
    return running
