"""Settings of a task reward beside distillation."""

from typing import Annotated

from pydantic import Field

from rayk.config.base import FUNCTION_PATTERN, Settings


class RewardConfig(Settings):
    """A reward for whole completions, which is added to the distillation's reward of each of their tokens: `weight`
    times the difference from the mean reward of the same prompt's completions in the step (`rollouts.samples`). As in
    GRPO, but without division by the standard deviation."""

    function: Annotated[str, Field(pattern=rf"^(number_answer|{FUNCTION_PATTERN[1:-1]})$")] = "number_answer"
    """`number_answer`: 1 if the completion's answer is the number in the row's field `answer`, else 0. `module:name`:
    your function `reward(completion: str, row: dict) -> float`, which gets the row's fields. With `rollouts.tool`, the
    completion is the last turn."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Nats that a reward of 1 is worth."""
