"""Settings of `logit_kd`."""

from typing import Literal

from pydantic import model_validator

from rayk.config.base import Share
from rayk.config.methods.divergence import DivergenceMethodConfig
from rayk.config.support import Requested


class LogitKDConfig(DivergenceMethodConfig):
    """The student matches the teacher's distribution at every counted token of the rows."""

    kind: Literal["logit_kd"] = "logit_kd"
    """The method's kind."""
    hard_label_weight: Share = 0.0
    """Weight α in α·cross-entropy + (1−α)·divergence."""

    @model_validator(mode="after")
    def _check_ids(self) -> "LogitKDConfig":
        if isinstance(self.support, Requested):
            raise ValueError("logit_kd cannot learn from support 'requested'; use 'topk' or 'hidden'")
        return self
