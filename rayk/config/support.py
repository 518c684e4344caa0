"""Supports: which part of the teacher's distribution a signal carries. Plain data, so that settings can hold them."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

_STRICT = ConfigDict(extra="forbid")
_Temperatures = tuple[Annotated[float, Field(gt=0)], ...]


@dataclass(frozen=True)
class TopK:
    """The teacher's `k` likeliest tokens at each counted position, with the log-mass of all others.

    `temperatures`: the softmax temperatures at which a loss may read the signal exactly. For each the teacher sends
    one float32, log Σ p^(1/T) over the tokens outside the top k, taken before any rounding.
    """

    __pydantic_config__ = _STRICT

    k: Annotated[int, Field(ge=1)] = 64
    temperatures: _Temperatures = (1.0,)
    kind: Literal["topk"] = "topk"


@dataclass(frozen=True)
class Requested:
    """The teacher's log-probs at the ids each sequence names (`Sequence.requested`, m a position), united with its `k`
    likeliest: k + m different ids at every position, those named first, then the likeliest of the others.

    Reverse KL and JSD put their weight where the *student* has mass, so their ids are the student's (ALGORITHMS §22).
    `temperatures` as in `TopK`.
    """

    __pydantic_config__ = _STRICT

    k: Annotated[int, Field(ge=0)] = 64
    temperatures: _Temperatures = (1.0,)
    kind: Literal["requested"] = "requested"


@dataclass(frozen=True)
class Sampled:
    """`draws` tokens drawn with replacement from p^τ at each counted position, with weights whose expectation is p:
    random-sampling KD (arXiv 2503.16870). For forward KL and cross-entropy at temperature 1 only.

    The draws follow from `seed` and the sequence's own tokens, so a repeated request gets the same ones.
    """

    __pydantic_config__ = _STRICT

    draws: Annotated[int, Field(ge=1, le=255)] = 50
    tau: Annotated[float, Field(gt=0)] = 1.0
    seed: Annotated[int, Field(ge=0)] = 0
    kind: Literal["sampled"] = "sampled"


@dataclass(frozen=True)
class Hidden:
    """The teacher's final hidden states, after the final norm. With its head, which each node fetches once, they give
    the distribution over the whole vocabulary at any temperature, exact to `dtype`."""

    __pydantic_config__ = _STRICT

    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    kind: Literal["hidden"] = "hidden"


@dataclass(frozen=True)
class Logprob:
    """Only the log-prob of the sequence's own token at each counted position."""

    __pydantic_config__ = _STRICT

    kind: Literal["logprob"] = "logprob"


SUPPORTS = (TopK, Requested, Sampled, Hidden, Logprob)

Support = Annotated[TopK | Requested | Sampled | Hidden | Logprob, Field(discriminator="kind")]
"""Any support, told apart by `kind`."""


def bytes_a_token(support: Support, vocab_size: int, width: int, requested: int = 0) -> float:
    """About what a counted token's signal takes on the wire, `width` being the teacher's hidden size."""
    an_id = 2 if vocab_size <= 1 << 16 else 4
    match support:
        case TopK() | Requested():
            return (support.k + requested) * (an_id + 2) + 4 * len(support.temperatures) + 4
        case Sampled():
            # About 12 different ids among 50 draws from a language model (arXiv 2503.16870).
            return 0.25 * support.draws * (an_id + (1 if support.tau == 1.0 else 4)) + 9
        case Hidden():
            return width * (4 if support.dtype == "float32" else 2) + 4
        case Logprob():
            return 4
