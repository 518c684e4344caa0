"""Supports: the part of a teacher's distribution that a signal carries. Plain data without torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)
_ITEM_BYTES = {"int8": 1, "float16": 2, "bfloat16": 2, "float32": 4}
_Temperatures = tuple[Annotated[float, Field(gt=0)], ...]


@dataclass(frozen=True)
class TopK:
    """The teacher's `k` most likely tokens at each counted position, and the log of the remaining probability mass."""

    __pydantic_config__ = _STRICT

    k: Annotated[int, Field(ge=1)] = 64
    """Number of tokens per position."""
    temperatures: _Temperatures = (1.0,)
    """Softmax temperatures T at which a loss may read the signal exactly. For each, the teacher sends one float32 per
    position: log Σ p^(1/T) over the tokens outside the top k, computed before any rounding."""
    kind: Literal["topk"] = "topk"
    """The support's kind."""


@dataclass(frozen=True)
class Requested:
    """The teacher's log-probs at m requested ids per position (`TokenSequence.requested`) and at its own `k` most
    likely other ids: k + m different ids per position, the requested ones first.

    Reverse KL and Jensen–Shannon give most weight to tokens that are likely under the student, so the student's most
    likely tokens are requested.
    """

    __pydantic_config__ = _STRICT

    k: Annotated[int, Field(ge=0)] = 64
    """Number of the teacher's own tokens per position."""
    temperatures: _Temperatures = (1.0,)
    """As in support `topk`."""
    kind: Literal["requested"] = "requested"
    """The support's kind."""


@dataclass(frozen=True)
class Sampled:
    """`draws` tokens sampled with replacement from p^τ at each counted position, with weights whose expectation is p:
    random-sampling KD (arXiv 2503.16870). For forward KL and cross-entropy at temperature 1 only.

    The draws depend only on `seed` and the sequence's own tokens, so a repeated request returns the same draws.
    """

    __pydantic_config__ = _STRICT

    draws: Annotated[int, Field(ge=1, le=255)] = 50
    """Number of draws per position."""
    tau: Annotated[float, Field(gt=0)] = 1.0
    """Exponent τ of the distribution that is sampled from."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the draws."""
    kind: Literal["sampled"] = "sampled"
    """The support's kind."""


@dataclass(frozen=True)
class Hidden:
    """The teacher's final hidden states, after the final norm. With its head, which each node loads once, they give the
    distribution over the whole vocabulary at any temperature, exact up to the rounding of `dtype`."""

    __pydantic_config__ = _STRICT

    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """The type in which hidden states are sent."""
    kind: Literal["hidden"] = "hidden"
    """The support's kind."""


@dataclass(frozen=True)
class Logprob:
    """Only the log-prob of the sequence's own token at each counted position."""

    __pydantic_config__ = _STRICT

    kind: Literal["logprob"] = "logprob"
    """The support's kind."""


LayerPart = Literal["output", "attention"]
"""The tensor that counts as a layer's state; see `Layers.part`."""


@dataclass(frozen=True)
class Layers:
    """States of some of the teacher's layers: the output of each layer, before the final norm, or what its attention
    compares. For feature distillation."""

    __pydantic_config__ = _STRICT

    layers: Annotated[int, Field(ge=1)] | Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = 4
    """The numbers of the layers, from 0; or N for that many layers, spread evenly, of which the last layer is one."""
    dtype: Literal["int8", "float16", "bfloat16", "float32"] = "int8"
    """The type in which states are sent. `int8`: each block of 32 numbers has a scale, so that a number's error is at
    most 0.4 % of the largest one of its block. `float16` cannot represent states above 65,504, which are refused."""
    final: Literal["float16", "bfloat16", "float32"] | None = None
    """The type in which the final hidden states are sent too, as by support `hidden`, so that a loss can use the
    teacher's distribution; `null`: they are not sent."""
    part: LayerPart = "output"
    """The state of a layer: its output; or `attention`: the queries, keys and values of all heads, one after the other,
    as the linear maps return them, before norms and position embeddings."""
    kind: Literal["layers"] = "layers"
    """The support's kind."""

    @property
    def count(self) -> int:
        """Number of layers."""
        return self.layers if isinstance(self.layers, int) else len(self.layers)


SUPPORTS = (TopK, Requested, Sampled, Hidden, Logprob, Layers)

Support = Annotated[TopK | Requested | Sampled | Hidden | Logprob | Layers, Field(discriminator="kind")]
"""Any support, distinguished by `kind`."""


STATE_BLOCK = 32
"""Numbers of a layer's state that share one scale in type `int8`."""


def final_dtype(support: Support | None) -> Literal["float16", "bfloat16", "float32"] | None:
    """Return the type of the final hidden states in a signal of this support; None if it has none."""
    if isinstance(support, Hidden):
        return support.dtype
    return support.final if isinstance(support, Layers) else None


def bytes_per_token(support: Support, vocab_size: int, width: int, requested: int = 0) -> float:
    """Estimate the bytes of one counted token's signal on the wire.

    Args:
        width: the teacher's hidden size.
        requested: number of requested ids per position.
    """
    id_bytes = 2 if vocab_size <= 1 << 16 else 4
    match support:
        case TopK() | Requested():
            return (support.k + requested) * (id_bytes + 2) + 4 * len(support.temperatures) + 4
        case Sampled():
            # 50 draws from a language model have about 12 different ids (arXiv 2503.16870).
            return 0.25 * support.draws * (id_bytes + (1 if support.tau == 1.0 else 4)) + 9
        case Hidden():
            return width * _ITEM_BYTES[support.dtype] + 4
        case Layers():
            final = width * _ITEM_BYTES[support.final] if support.final else 0
            width *= 3 if support.part == "attention" else 1  # less if heads share keys and values
            scales = 2 * -(-width // STATE_BLOCK) if support.dtype == "int8" else 0
            return support.count * (width * _ITEM_BYTES[support.dtype] + scales) + final + 4
        case Logprob():
            return 4
