"""What the student writes while it trains, and how old the weights may be that write it."""

from typing import Annotated, Literal

from pydantic import Field

from rayk.config.base import Positive, Settings


class WorkerRollouts(Settings):
    """The training workers generate, each the completions of its own rows."""

    kind: Literal["worker"] = "worker"
    max_new_tokens: Positive = 256
    """A completion that is longer is cut; what was written of it counts, an end that was not written does not."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Of sampling alone; 0 is greedy. GKD's reverse KL is taken under the student itself: temperature 1, no
    truncation."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    """0: all tokens."""
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """Step i (from 0) learns from completions sampled under exactly the weights after i − `max_staleness` steps (the
    first ones under the initial weights). 0 samples each step from its own weights, in turn with training; from 1 on a
    copy of the student generates for later steps while this one trains. Reproducible either way."""


RolloutConfig = WorkerRollouts
