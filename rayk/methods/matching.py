"""The divergence between student and teacher that several methods share."""

from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from rayk.config import AlignmentConfig, DivergenceLossConfig, MethodSettings
from rayk.data.examples import Example
from rayk.losses import AlignedLoss, Match, aligned_divergence, linear_match
from rayk.losses.comparison import OVERLAP_TOKENS
from rayk.losses.divergences import Divergence, try_divergence
from rayk.methods.base import Experience, StudentOutput
from rayk.methods.decoupled import decoupled_loss
from rayk.models import Head
from rayk.signals.alignment import TokenGroups, VocabularyMap
from rayk.text.functions import load_function


def soft_loss(
    settings: DivergenceLossConfig, student: StudentOutput, experience: Experience
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return T^s·D(p_T ‖ q_T) at each counted token, nats [tokens] (s = 2 with `temperature_squared`, else 0), and
    terms for the metrics: D, the cross-entropy on the rows' tokens at temperature 1, and those of `linear_match`."""
    assert experience.signals is not None
    if (alignment := getattr(settings, "alignment", None)) is not None:
        return _aligned_soft_loss(settings, alignment, student, experience)
    if settings.divergence.reads_targets:
        return decoupled_loss(settings, student, experience, compared_tokens(settings))
    match = match_teacher(
        load_divergence(settings), student, student.head, experience, temperature=settings.temperature,
        compared=compared_tokens(settings), **settings.divergence.options,
    )  # fmt: skip
    divergence, cross_entropy = match.divergence, match.cross_entropy
    assert cross_entropy is not None
    soft = divergence * settings.temperature**2 if settings.temperature_squared else divergence
    name = settings.divergence.name.rpartition(":")[2]
    return soft, {"cross_entropy": cross_entropy, name: divergence, **match.terms}


def _aligned_soft_loss(
    settings: DivergenceLossConfig, alignment: AlignmentConfig, student: StudentOutput, experience: Experience
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


def match_teacher(
    divergence: str | Divergence, student: StudentOutput, head: Head, experience: Experience, temperature: float = 1.0,
    compared: int = 0, **options: Any,
) -> Match:  # fmt: skip
    """Return a divergence, the cross-entropy and terms for the metrics at each counted token (`linear_match`)."""
    batch, signals = experience.batch, experience.signals
    assert signals is not None
    return linear_match(
        student.hidden(batch), head, signals, divergence, temperature=temperature, targets=batch.targets,
        compared=compared, **options,
    )  # fmt: skip


def compared_tokens(settings: MethodSettings) -> int:
    """Return the number of most likely tokens of both models that the metrics compare: none in methods without
    rollouts, where the evaluation on fixed rows shows the same."""
    return OVERLAP_TOKENS if settings.samples_rollouts else 0


def load_divergence(settings: Any) -> str | Divergence:
    """Return the divergence of a method's settings: a name in `DIVERGENCES`, or the user's function; "" without one.

    Raises:
        InputError: the function cannot be loaded, does not take log-probs and the given options, or returns another
            shape than [tokens].
    """
    if not isinstance(settings, DivergenceLossConfig):
        return ""
    if not settings.divergence.is_custom:
        return settings.divergence.name
    return _load_function(settings.divergence.name, tuple(sorted(settings.divergence.options.items())))


@lru_cache
def _load_function(path: str, options: tuple[tuple[str, float], ...]) -> Divergence:
    function = load_function(path, "method.divergence")
    try_divergence(function, **dict(options))
    return function
