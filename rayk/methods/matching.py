"""What `logit_kd` and `on_policy` share: the student's distributions held against the teacher's."""

from typing import Any

from torch import Tensor

from rayk.config import DivergenceMethodConfig
from rayk.config.support import Hidden, Sampled
from rayk.losses import DIVERGENCES, linear_divergence, linear_outcomes
from rayk.methods.base import Experience, Student
from rayk.models import Head


def soft_loss(
    settings: DivergenceMethodConfig, student: Student, experience: Experience
) -> tuple[Tensor, dict[str, Tensor]]:
    """T^s·D(p_T ‖ q_T) at each counted token, nats [tokens] (s = 2 with `temperature_squared`, else 0), and the terms
    for the metrics: D itself, the cross-entropy on the rows' own tokens at temperature 1, and, where the teacher names
    ids, how much of each side's mass is on them."""
    assert experience.signals is not None
    divergence, cross_entropy, terms = with_masses(
        settings.divergence.name, student, student.head, experience, temperature=settings.temperature,
        **settings.divergence.options,
    )  # fmt: skip
    soft = divergence * settings.temperature**2 if settings.temperature_squared else divergence
    return soft, {"cross_entropy": cross_entropy, settings.divergence.name: divergence, **terms}


def with_masses(
    name: str, student: Student, head: Head, experience: Experience, temperature: float = 1.0, **options: Any
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A divergence and the cross-entropy at each counted token, nats [tokens]; and, where the teacher names ids, how
    much of each side's mass is on them, [tokens] each: a divergence does not see where the rest of it goes."""
    batch, signals, hidden = experience.batch, experience.signals, student.hidden(experience.batch)
    assert signals is not None
    if isinstance(signals.support, Hidden | Sampled):
        divergence, cross_entropy = linear_divergence(
            hidden, head, signals, divergence=name, temperature=temperature, targets=batch.targets, **options
        )
        return divergence, cross_entropy, {}
    log_p, log_q, target = linear_outcomes(hidden, head, signals, batch.targets, temperature)
    assert target is not None
    masses = {"teacher_mass": 1 - log_p[:, -1].exp(), "student_mass": 1 - log_q[:, -1].exp()}
    return DIVERGENCES[name](log_p, log_q, has_tail=True, **options), -target, masses
