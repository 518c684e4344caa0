"""Settings of `supervised`."""

from typing import Literal

from rayk.config.sections import MethodSettings


class SupervisedConfig(MethodSettings):
    """Cross-entropy on the rows' own tokens."""

    kind: Literal["supervised"] = "supervised"
    """The method's kind."""
