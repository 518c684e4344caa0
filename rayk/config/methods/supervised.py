"""Settings of `supervised`."""

from typing import Literal

from rayk.config.methods.normalization import TokenLossConfig


class SupervisedConfig(TokenLossConfig):
    """Cross-entropy on the rows' own tokens."""

    kind: Literal["supervised"] = "supervised"
    """The method's kind."""
