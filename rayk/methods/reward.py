"""Task rewards of completions, beside distillation (settings: `rayk.config.RewardConfig`)."""

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import torch

from rayk.config import RewardConfig
from rayk.errors import InputError
from rayk.methods.base import Experience, Workers
from rayk.rollouts import Rollout
from rayk.text.answers import answers_match, find_answer
from rayk.text.functions import call_function, load_function

_SETTING = "method.reward.function"
COLUMN = "task_advantage"
"""Column of `Experience` with the weighted difference from the mean reward, one value per counted token."""


class TaskReward:
    """Computes the reward of each completion.

    Raises:
        InputError: the user's function cannot be loaded.
    """

    def __init__(self, settings: RewardConfig):
        self._weight, self._name = settings.weight, settings.function
        self._function: Callable[[str, Mapping[str, Any]], Any] = (
            number_answer if settings.function == "number_answer" else load_function(settings.function, _SETTING)
        )

    def score(self, rollout: Rollout) -> Rollout:
        """Return the rollout with its reward.

        Raises:
            InputError: the function fails, or returns no finite number.
        """
        value = call_function(self._function, self._name, _SETTING, rollout.where, rollout.text, rollout.fields)
        if not isinstance(value, Real) or not math.isfinite(value):
            raise InputError(
                f"{_SETTING}: '{self._name}' returns {value!r:.60} for {rollout.where}; return a finite number."
            )
        return replace(rollout, reward=float(value))

    def add_advantages(self, experience: Experience, workers: Workers) -> Experience:
        """Add `COLUMN` to an experience of scored rollouts. A collective, because the completions of a prompt may be on
        several workers."""
        rollouts = [row for row in experience.batch.sequences if isinstance(row, Rollout)]
        own = [(_prompt_key(row), row.reward or 0.0) for row in rollouts]
        everywhere = [pair for pairs in workers.gather(own) for pair in pairs]
        values = torch.tensor(centered(own, everywhere)) * self._weight
        lengths = torch.tensor([row.counted_tokens for row in rollouts])
        return replace(experience, columns={**experience.columns, COLUMN: values.repeat_interleave(lengths)})


def number_answer(completion: str, row: Mapping[str, Any]) -> float:
    """Return 1.0 if the answer in `completion` is the number in `row["answer"]`, else 0.0.

    Raises:
        InputError: the row has no number in its field `answer`.
    """
    right = find_answer(str(row.get("answer", "")), "number")
    if right is None:
        raise InputError(
            f"{_SETTING} 'number_answer' needs a number in the field 'answer' of each row, but one has "
            f"{row.get('answer')!r:.60}; add the field, or use a function of your own."
        )
    found = find_answer(completion, "number")
    return float(found is not None and answers_match(found, right, "number"))


def centered(own: Sequence[tuple[str, float]], everywhere: Sequence[tuple[str, float]]) -> list[float]:
    """Return the rewards of `own` less the mean reward of the same key in `everywhere`."""
    rewards: dict[str, list[float]] = defaultdict(list)
    for key, reward in everywhere:
        rewards[key].append(reward)
    means = {key: math.fsum(found) / len(found) for key, found in rewards.items()}
    return [reward - means[key] for key, reward in own]


def _prompt_key(row: Rollout) -> str:
    return f"{row.where} {hashlib.sha256(row.prompt_ids.tobytes()).hexdigest()}"
