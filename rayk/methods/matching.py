"""The divergence between student and teacher that several methods share."""

from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from rayk.config import AlignmentConfig, DivergenceMethodConfig
from rayk.config.support import Hidden, Sampled
from rayk.data.examples import Example
from rayk.losses import AlignedLoss, aligned_divergence, find_divergence, linear_divergence, linear_outcomes
from rayk.losses.divergences import Divergence
from rayk.methods.base import Experience, Student
from rayk.models import Head
from rayk.signals.alignment import TokenGroups, VocabularyMap
from rayk.text.functions import load_function


def soft_loss(
    settings: DivergenceMethodConfig, student: Student, experience: Experience
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return T^s·D(p_T ‖ q_T) at each counted token, nats [tokens] (s = 2 with `temperature_squared`, else 0), and
    terms for the metrics: D, the cross-entropy on the rows' tokens at temperature 1, and the masses that
    `divergence_with_masses` returns."""
    assert experience.signals is not None
    if (alignment := getattr(settings, "alignment", None)) is not None:
        return _aligned_soft_loss(settings, alignment, student, experience)
    divergence, cross_entropy, masses = divergence_with_masses(
        load_divergence(settings), student, student.head, experience, temperature=settings.temperature,
        **settings.divergence.options,
    )  # fmt: skip
    soft = divergence * settings.temperature**2 if settings.temperature_squared else divergence
    name = settings.divergence.name.rpartition(":")[2]
    return soft, {"cross_entropy": cross_entropy, name: divergence, **masses}


def _aligned_soft_loss(
    settings: DivergenceMethodConfig, alignment: AlignmentConfig, student: Student, experience: Experience
) -> tuple[Tensor, dict[str, Tensor]]:
    """Like `soft_loss`, from a teacher with another tokenizer. With `unmatched: sorted`, the weighted sorted distance
    is added. The terms `aligned` and `compared` are the shares of tokens in groups, and of compared distributions."""
    batch, signals = experience.batch, experience.signals
    assert signals is not None
    is_sorted = alignment.unmatched == "sorted" and alignment.unmatched_weight > 0
    groups, vocabulary = _batch_groups(experience)
    loss: AlignedLoss = aligned_divergence(
        student.hidden(batch), student.head, signals, groups, vocabulary, batch.targets, load_divergence(settings),
        temperature=settings.temperature, unmatched=is_sorted, **settings.divergence.options,
    )  # fmt: skip
    soft = loss.divergence * settings.temperature**2 if settings.temperature_squared else loss.divergence
    name = settings.divergence.name.rpartition(":")[2]
    terms = {"cross_entropy": loss.cross_entropy, name: loss.divergence}
    if is_sorted:
        soft = soft + alignment.unmatched_weight * loss.unmatched
        terms["unmatched"] = loss.unmatched
    return soft, {**terms, "aligned": loss.is_aligned, "compared": loss.is_compared}


def _batch_groups(experience: Experience) -> tuple[TokenGroups, VocabularyMap]:
    """Return the groups of all rows, by index among the counted tokens of the batch and of its signals."""
    assert experience.signals is not None
    views = [next(iter(row.aligned.values())) for row in experience.batch.sequences if isinstance(row, Example)]
    starts = experience.batch.offsets.tolist(), experience.signals.offsets.tolist()
    groups = TokenGroups(
        np.concatenate([view.groups.student + start for view, start in zip(views, starts[0], strict=False)]),
        np.concatenate([view.groups.teacher + start for view, start in zip(views, starts[1], strict=False)]),
        np.concatenate([view.groups.is_single for view in views]),
    )
    return groups, views[0].vocabulary


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
