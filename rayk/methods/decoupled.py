"""Divergences that treat the gold token apart: DKD (arXiv 2203.08679) and ATKD (2402.11890).

    decoupled_kl:       L = w·Σ_t (α·TCKD_t + β·NCKD_t) / N,   w = min((step + 1) / warmup_steps, 1)
    adaptive_teaching:  L = α·mean over easy tokens of NCKD + (1−α)·mean over hard tokens of (TCKD + NCKD)

A token is easy if 1 − p(gold) is below its median over the counted tokens of the step. N, the median and the sizes of
both groups are those of all workers together, so the result depends neither on workers nor on micro-batches. The gold
token is the one in the row: the data's, or on-policy the one that the student sampled.
"""

import dataclasses

import torch
from torch import Tensor

from rayk.config import DivergenceLossConfig
from rayk.losses import gold_uncertainty, linear_decoupled_terms
from rayk.methods.base import Experience, StudentOutput, Workers

_WEIGHT, _IS_HARD = "soft_weight", "is_hard"


def weigh_tokens(
    settings: DivergenceLossConfig, experience: Experience, workers: Workers, step: int
) -> Experience:  # fmt: skip
    """Add the columns that `decoupled_loss` reads; nothing for other divergences. A collective for
    `adaptive_teaching`.

    Args:
        step: number of finished optimizer steps.
    """
    if not (settings.uses_divergence and settings.divergence.reads_targets):
        return experience
    assert experience.signals is not None
    if settings.divergence.name == "decoupled_kl":
        warmup = settings.divergence.warmup_steps
        weight = min((step + 1) / warmup, 1.0) if warmup else 1.0
        columns = {_WEIGHT: torch.full((experience.count,), weight)}
    else:
        columns = _group_columns(settings, gold_uncertainty(experience.signals, experience.batch.targets), workers)
    return dataclasses.replace(experience, columns={**experience.columns, **columns})


def _group_columns(settings: DivergenceLossConfig, uncertainty: Tensor, workers: Workers) -> dict[str, Tensor]:
    """Return for each token whether it is hard, and its weight: N·α / (number of easy tokens), or N·(1−α) / (number of
    hard tokens), so that the mean over all N tokens is the loss. An empty group adds nothing."""
    everywhere = torch.cat(workers.gather(uncertainty))
    threshold = everywhere.median() if len(everywhere) else 0.0
    easy_count = int((everywhere < threshold).sum())
    is_hard = uncertainty >= threshold
    alpha = settings.divergence.options.get("alpha", 0.2)
    total = len(everywhere)
    weights = total * alpha / max(easy_count, 1), total * (1 - alpha) / max(total - easy_count, 1)
    return {_IS_HARD: is_hard, _WEIGHT: torch.where(is_hard, weights[1], weights[0])}


def decoupled_loss(
    settings: DivergenceLossConfig, student: StudentOutput, experience: Experience, compared: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss at each counted token with T² as the settings say, [tokens], and terms for the metrics: the
    cross-entropy at temperature 1, TCKD, NCKD, for `adaptive_teaching` the share of hard tokens, and the comparison of
    the `compared` most likely tokens."""
    batch, signals = experience.batch, experience.signals
    assert signals is not None
    terms = linear_decoupled_terms(
        student.hidden(batch), student.head, signals, batch.targets, temperature=settings.temperature,
        compared=compared,
    )  # fmt: skip
    metrics = {"cross_entropy": terms.cross_entropy, "target_kl": terms.target, "others_kl": terms.others}
    metrics |= terms.comparison
    if settings.divergence.name == "decoupled_kl":
        options = settings.divergence.options
        loss = options.get("alpha", 1.0) * terms.target + options.get("beta", 8.0) * terms.others
    else:
        is_hard = experience.columns[_IS_HARD]
        loss = terms.others + torch.where(is_hard, terms.target, 0.0)
        metrics["hard"] = is_hard.float()
    loss = loss * experience.columns[_WEIGHT].to(loss.dtype)
    return loss * settings.temperature**2 if settings.temperature_squared else loss, metrics
