"""Settings of plain text that is trained on beside a method's rows."""

from typing import Annotated

from pydantic import Field

from rayk.config.base import Positive, Settings, Share
from rayk.config.data import DataSource


class PretrainingConfig(Settings):
    """Plain text that is trained on in the same updates as the method's rows, so that the student forgets less
    (MiniLLM's L_PT)."""

    data: DataSource
    """The rows of text."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the text's mean loss per token, which is added to the method's loss."""
    batch_size: Positive | None = None
    """Rows of text per step; `null`: `training.batch_size`."""
    teacher_share: Share = 0.5
    """Share r in (1−r)·cross-entropy + r·forward KL to the teacher. 0 queries no teacher for the text (the paper's
    form); LMOps uses 0.5."""
