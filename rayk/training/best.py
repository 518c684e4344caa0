"""The best evaluation of a run so far, by `evaluation.keep_best`, and when to stop waiting for a better one."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from rayk.config import EvaluationConfig
from rayk.errors import InputError


class BestEvaluation:
    """Compares the evaluations of a run. All ranks see the same metrics, so they decide alike without communication.

    Attributes:
        step: the step of the best evaluation; None before the first one, or without `evaluation.keep_best`.
        value: its metric.
    """

    def __init__(self, settings: EvaluationConfig):
        self._settings, self._patience = settings.keep_best, settings.patience
        self.step: int | None = None
        self.value: float | None = None
        self._since = 0
        """Number of evaluations after the best one."""

    @property
    def patience_is_over(self) -> bool:
        """Return whether `evaluation.patience` evaluations in a row were not better."""
        return self._patience is not None and self._since >= self._patience

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Compare the evaluation after `step` with the best one. NaN is never the best.

        Raises:
            InputError: the metric was not measured.
        """
        if self._settings is None:
            return
        name = self._settings.metric
        if name not in metrics:
            raise InputError(
                f"evaluation.keep_best.metric '{name}' was not measured at step {step}; choose one of "
                f"{', '.join(metrics)}."
            )
        if self._is_better(metrics[name]):
            self.step, self.value, self._since = step, metrics[name], 0
        else:
            self._since += 1

    def _is_better(self, value: float) -> bool:
        assert self._settings is not None
        if math.isnan(value) or self.value is None:
            return not math.isnan(value)
        return value < self.value if self._settings.is_lower_better else value > self.value

    def summary(self) -> dict[str, Any] | None:
        """Return step, metric and value of the best evaluation for `summary.json`; None without one."""
        if self._settings is None or self.step is None:
            return None
        return {
            "step": self.step, "metric": self._settings.metric, "value": self.value,
            "stopped_early": self.patience_is_over,
        }  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, plain values; {} without `evaluation.keep_best`."""
        if self._settings is None:
            return {}
        chosen = {"metric": self._settings.metric, "lower": self._settings.is_lower_better}
        return {**chosen, "step": self.step, "value": self.value, "since": self._since}

    def load_state_dict(self, state: Mapping[str, Any], steps: Collection[int]) -> None:
        """Restore what `state_dict` returned, unless it belongs to another metric, or the checkpoint of its step is not
        among `steps`."""
        chosen = {key: state.get(key) for key in ("metric", "lower")}
        if not state or chosen != {key: self.state_dict().get(key) for key in chosen}:
            return
        if state["step"] is None or state["step"] in steps:
            self.step, self.value, self._since = state["step"], state["value"], state["since"]
