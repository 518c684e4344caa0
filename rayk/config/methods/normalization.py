"""The weight of a token in a mean loss, which several methods share."""

from typing import Literal

from rayk.config.sections import MethodSettings


class TokenLossConfig(MethodSettings):
    """Base of methods with a loss at each counted token."""

    normalize: Literal["tokens", "sequences"] = "tokens"
    """The mean that the loss is: over all counted tokens of the step, or, with `sequences`, over its sequences of the
    means over their tokens (as in GKD's paper), so that a short answer has the weight of a long one. The training
    metrics are the same mean."""

    @property
    def averages_sequences(self) -> bool:
        return self.normalize == "sequences"
