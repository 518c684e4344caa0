"""What a run has on Ray Serve, under which names, and the CPUs that takes."""

import hashlib
from collections.abc import Collection, Mapping
from contextlib import ExitStack

from rayk.config import RunConfig, ServedRollouts, StudentSynthesisConfig, TeacherConfig
from rayk.models import weights_fingerprint
from rayk.serving.cluster import start_ray
from rayk.teachers import Teacher, connect_teacher, serve_teacher
from rayk.teachers.cache import SignalCache


def required_cpus(config: RunConfig) -> float:
    """Logical CPUs the run asks Ray for at a time."""
    needs = {t.name: t.resources.num_cpus * t.replicas.max for t in config.teachers if not t.attach}
    writing = sum(needs.get(name, 0.0) for name in config.synthesis_teachers)
    if isinstance(config.synthesis, StudentSynthesisConfig) and config.synthesis.reads_student:
        writing += config.synthesis.student.resources.num_cpus * config.synthesis.student.replicas.max
    training = sum(need for name, need in needs.items() if name not in config.synthesis_only_teachers)
    if isinstance(config.rollouts, ServedRollouts):
        training += config.rollouts.resources.num_cpus * config.rollouts.replicas.max
    return max(writing, training + config.training.workers * config.training.resources.num_cpus) + 1


def connect_attached_teachers(config: RunConfig) -> dict[str, Teacher]:
    """The teachers that must already run, asked.

    Raises:
        InputError: one does not answer.
    """
    names = [teacher.name for teacher in config.teachers if teacher.attach]
    if names:
        start_ray(required_cpus(config))
    return {name: connect_teacher(name) for name in names}


def teacher_applications(config: RunConfig) -> dict[str, str]:
    """Each teacher's Serve application."""
    return {t.name: t.name if t.attach else f"{t.name}-{_owner(config)}" for t in config.teachers}


def policy_application(config: RunConfig) -> str:
    """The Serve application of the run's own policy; no teacher's name begins so."""
    return f"_policy-{_owner(config)}"


def served_student_config(config: RunConfig) -> TeacherConfig:
    """The student as the run begins, as a Serve application that answers like a teacher. No teacher's name is so, nor
    that of a student with other weights, which a killed run may have left under the same path."""
    model = config.student.model
    assert isinstance(config.synthesis, StudentSynthesisConfig) and model is not None
    return TeacherConfig(
        name=f"{_owner(config)}-student-{weights_fingerprint(model)[:8] or 'hub'}", model=model,
        trust_remote_code=config.student.trust_remote_code, **dict(config.synthesis.student),
    )  # fmt: skip


def _owner(config: RunConfig) -> str:
    """What a run's own Serve applications are named after, its output, so that two runs on a cluster do not take each
    other's, and a resumed run finds what a killed one has left."""
    return hashlib.sha256(str(config.output_path).encode()).hexdigest()[:8]


def serve_teachers(
    config: RunConfig, applications: Mapping[str, str], stack: ExitStack, cache: SignalCache | None,
    names: Collection[str] | None = None,
) -> dict[str, Teacher]:  # fmt: skip
    """The teachers of these names, by default those of training, up until `stack` closes."""
    running = {}
    names = [each.name for each in config.training_teachers] if names is None else names
    for teacher in (each for each in config.teachers if each.name in names):
        application = teacher.model_copy(update={"name": applications[teacher.name]})
        served = serve_teacher(application, cache if teacher.gives_signals else None)
        running[teacher.name] = stack.enter_context(served)
    return running
