"""Supports: which part of the teacher's distribution a signal carries. Plain data, so that settings can hold them."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class TopK:
    """The teacher's `k` likeliest tokens at each counted position, with the log-mass of all others.

    `temperatures`: the softmax temperatures at which a loss may read the signal exactly. For each the teacher sends
    one float32, log Σ p^(1/T) over the tokens outside the top k, taken before any rounding.
    """

    __pydantic_config__ = _STRICT

    k: Annotated[int, Field(ge=1)] = 64
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = (1.0,)
    kind: Literal["topk"] = "topk"


@dataclass(frozen=True)
class Logprob:
    """Only the log-prob of the sequence's own token at each counted position."""

    __pydantic_config__ = _STRICT

    kind: Literal["logprob"] = "logprob"


SUPPORTS = (TopK, Logprob)

Support = Annotated[TopK | Logprob, Field(discriminator="kind")]
"""Any support, told apart by `kind`."""
