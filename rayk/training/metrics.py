"""Values of a step's row in `metrics.jsonl`."""

from collections.abc import Mapping

from rayk.evaluation.evaluate import Evaluation
from rayk.methods import Experience
from rayk.rollouts import Rollout, summarize_rollouts
from rayk.training.experiences import TimeSpan
from rayk.training.ranks import Ranks


def span_metrics(name: str, span: TimeSpan | None) -> dict[str, float]:
    """Return start and duration of a part of the step; {} if there was no such part."""
    return {} if span is None else {f"{name}_started_at": span.started_at, f"{name}_seconds": span.seconds}


def rollout_metrics(experience: Experience, step: int, ranks: Ranks) -> dict[str, float]:
    """Return the number of rollouts of a step and the means over them. A collective: all ranks must call it."""
    rollouts = [row for row in experience.batch.sequences if isinstance(row, Rollout)]
    sums = summarize_rollouts(rollouts, version=step)
    count, *totals = ranks.sums(list(sums.values()))
    means = {name: total / max(count, 1) for name, total in zip(list(sums)[1:], totals, strict=True)}
    if all(rollout.reward is None for rollout in rollouts):
        del means["rollout_reward"]
    return {"rollouts": int(count), **means}


def policy_wait_metrics(row: Mapping[str, float], seconds: float, ended_at: float) -> dict[str, float]:
    """Return a step's times including `seconds` in which the loop waited for the policy."""
    step_seconds = row["step_seconds"] + seconds
    return {
        "policy_wait_seconds": seconds,
        "step_seconds": step_seconds,
        "tokens_per_second": row["tokens"] / step_seconds,
        "ended_at": ended_at,
    }


def evaluation_metrics(evaluation: Evaluation) -> dict[str, float]:
    """Return an evaluation's metrics, prefixed with `evaluation_`."""
    return {f"evaluation_{name}": value for name, value in evaluation.metrics.items()}
