"""The divergence between student and teacher that several methods share."""

from functools import lru_cache
from typing import Any

from torch import Tensor

from rayk.config import DivergenceMethodConfig
from rayk.config.support import Hidden, Sampled
from rayk.losses import find_divergence, linear_divergence, linear_outcomes
from rayk.losses.divergences import Divergence
from rayk.methods.base import Experience, Student
from rayk.models import Head
from rayk.text.functions import load_function


def soft_loss(
    settings: DivergenceMethodConfig, student: Student, experience: Experience
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return T^s·D(p_T ‖ q_T) at each counted token, nats [tokens] (s = 2 with `temperature_squared`, else 0), and
    terms for the metrics: D, the cross-entropy on the rows' tokens at temperature 1, and the masses that
    `divergence_with_masses` returns."""
    assert experience.signals is not None
    divergence, cross_entropy, masses = divergence_with_masses(
        load_divergence(settings), student, student.head, experience, temperature=settings.temperature,
        **settings.divergence.options,
    )  # fmt: skip
    soft = divergence * settings.temperature**2 if settings.temperature_squared else divergence
    name = settings.divergence.name.rpartition(":")[2]
    return soft, {"cross_entropy": cross_entropy, name: divergence, **masses}


def divergence_with_masses(
    divergence: str | Divergence, student: Student, head: Head, experience: Experience, temperature: float = 1.0,
    **options: Any,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:  # fmt: skip
    """Return a divergence and the cross-entropy at each counted token, nats [tokens], and, for signals with ids, the
    mass of teacher and student on these ids, [tokens] each (the divergence does not see where the remaining mass
    goes)."""
    batch, signals, hidden = experience.batch, experience.signals, student.hidden(experience.batch)
    assert signals is not None
    if isinstance(signals.support, Hidden | Sampled):
        distance, cross_entropy = linear_divergence(
            hidden, head, signals, divergence, temperature=temperature, targets=batch.targets, **options
        )
        return distance, cross_entropy, {}
    log_p, log_q, target = linear_outcomes(hidden, head, signals, batch.targets, temperature)
    assert target is not None
    masses = {"teacher_mass": 1 - log_p[:, -1].exp(), "student_mass": 1 - log_q[:, -1].exp()}
    return find_divergence(divergence, **options)(log_p, log_q, has_tail=True), -target, masses


def load_divergence(settings: Any) -> str | Divergence:
    """Return the divergence of a method's settings: a name in `DIVERGENCES`, or the user's function; "" without one.

    Raises:
        InputError: the function cannot be loaded, or does not take the given options.
    """
    if not isinstance(settings, DivergenceMethodConfig):
        return ""
    if not settings.divergence.is_custom:
        return settings.divergence.name
    function = _load_function(settings.divergence.name)
    find_divergence(function, **settings.divergence.options)
    return function


@lru_cache
def _load_function(path: str) -> Divergence:
    return load_function(path, "method.divergence")
