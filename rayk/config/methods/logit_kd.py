"""Settings of `logit_kd`."""

from typing import Literal

from pydantic import model_validator

from rayk.config.base import Share
from rayk.config.methods.alignment import AlignmentConfig, check_alignment
from rayk.config.methods.divergence import DivergenceMethodConfig
from rayk.config.methods.normalization import TokenLossConfig
from rayk.config.sections import Run
from rayk.config.support import Requested


class LogitKDConfig(DivergenceMethodConfig, TokenLossConfig):
    """The student matches the teacher's distribution at every counted token of the rows."""

    kind: Literal["logit_kd"] = "logit_kd"
    """The method's kind."""
    hard_label_weight: Share = 0.0
    """Weight α in α·cross-entropy + (1−α)·divergence."""
    soft_reduction: Literal["mean", "batchmean"] = "mean"
    """The reduction of the divergence. `mean`: as that of the cross-entropy (`normalize`). `batchmean`: its sum over
    the tokens, divided by the number of rows only, as in the code of BabyLlama (PyTorch's `KLDivLoss` with this
    reduction); the divergence then counts as many times more as a row has tokens."""
    alignment: AlignmentConfig | None = None
    """Align the tokens of a teacher with another tokenizer; `null`: the teacher has the student's vocabulary."""

    @model_validator(mode="after")
    def _check_ids(self) -> "LogitKDConfig":
        if isinstance(self.support, Requested):
            raise ValueError("logit_kd cannot learn from support 'requested'; use 'topk' or 'hidden'")
        return self

    @model_validator(mode="after")
    def _check_reduction(self) -> "LogitKDConfig":
        if self.soft_reduction == "batchmean" and (self.normalize != "tokens" or self.divergence.reads_targets):
            raise ValueError(
                "soft_reduction 'batchmean' is defined with normalize 'tokens' and divergences without weights of "
                "their own; leave one of them out"
            )
        return self

    @property
    def aligns_tokens(self) -> bool:
        return self.alignment is not None

    def check(self, run: Run) -> None:
        super().check(run)
        if self.alignment is not None:
            check_alignment(self, run)
