"""Names of the evaluation metrics, and the metrics of single answers that `evaluation.metrics` adds."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from rayk.data.examples import Example
from rayk.errors import InputError
from rayk.text.functions import call_function, load_function
from rayk.text.rouge import rouge_l
from rayk.text.squad import exact_match, f1

MEAN_METRICS = {
    "loss": ("cross_entropy", "tokens"),
    "forward_kl": ("forward_kl", "signal_tokens"),
    "reverse_kl": ("reverse_kl", "signal_tokens"),
    "agreement": ("agreement", "signal_tokens"),
    "teacher_entropy": ("teacher_entropy", "signal_tokens"),
    "teacher_mass": ("teacher_mass", "signal_tokens"),
    "student_mass": ("student_mass", "signal_tokens"),
    "accuracy": ("correct", "judged"),
    "answer_tokens": ("answer_tokens", "answers"),
    "stopped": ("stopped", "answers"),
    "preference_margin": ("preference_margin", "pairs"),
    "preference_accuracy": ("preferred", "pairs"),
}
"""Built-in metrics by name: the sum and the count in `Evaluation.sums` whose quotient is the metric."""

_SETTING = "evaluation.metrics"
BUILT_IN_METRICS = {"rouge_l": rouge_l, "exact_match": exact_match, "f1": f1}
"""Built-in metrics of single answers by name, each a function of the completion and one reference text."""


class AnswerMetrics:
    """Compute the metrics of `evaluation.metrics` for single answers.

    Args:
        paths: built-in names, or 'module:name' of functions `metric(completion: str, row: Mapping[str, Any]) -> float`.

    Raises:
        InputError: a function cannot be loaded, or two metrics have the same name.
    """

    def __init__(self, paths: Sequence[str]):
        self._built_in = {path: BUILT_IN_METRICS[path] for path in paths if path in BUILT_IN_METRICS}
        self._functions = {path: load_function(path, _SETTING) for path in paths if path not in BUILT_IN_METRICS}
        names = [*MEAN_METRICS, *map(_name, paths)]
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"{_SETTING}: two metrics are named '{name}'; rename the function.")

    def compute(self, completion: str, references: Sequence[str], row: Example) -> dict[str, float]:
        """Return the value of each metric for one completion, by name; the highest one over the references.

        Raises:
            InputError: a function fails or does not return a number.
        """
        values = {
            name: max(metric(completion, reference) for reference in references)
            for name, metric in self._built_in.items()
        }
        for path, function in self._functions.items():
            values[_name(path)] = _call(path, function, completion, row)
        return values


def _call(path: str, function: Any, completion: str, row: Example) -> float:
    value = call_function(function, path, _SETTING, row.where, completion, row.fields)
    if not isinstance(value, Real) or not math.isfinite(value):
        raise InputError(f"{_SETTING}: '{path}' returns {value!r:.60} for {row.where}; return a finite number.")
    return float(value)


def _name(path: str) -> str:
    return path.rpartition(":")[2]
