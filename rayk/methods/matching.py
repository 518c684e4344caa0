"""What `logit_kd` and `on_policy` share: the student's distributions held against the teacher's."""

from torch import Tensor

from rayk.config import MatchingConfig
from rayk.losses import linear_divergence
from rayk.methods.base import Experience, Student


def soft_loss(settings: MatchingConfig, student: Student, experience: Experience) -> tuple[Tensor, dict[str, Tensor]]:
    """T^s·D(p_T ‖ q_T) at each counted token, nats [tokens] (s = 2 with `temperature_squared`, else 0), and the terms
    for the metrics: D itself, and the cross-entropy on the rows' own tokens at temperature 1."""
    assert experience.signals is not None
    divergence, cross_entropy = linear_divergence(
        student.hidden(experience.batch),
        student.head,
        experience.signals,
        divergence=settings.divergence.name,
        temperature=settings.temperature,
        targets=experience.batch.targets,
        **settings.divergence.options,
    )
    soft = divergence * settings.temperature**2 if settings.temperature_squared else divergence
    return soft, {"cross_entropy": cross_entropy, settings.divergence.name: divergence}
