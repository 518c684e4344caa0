"""Requests to the replicas of teachers and of policies: score sequences, and generate completions."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rayk.config.support import Requested, Support
from rayk.engines.base import SamplingParameters
from rayk.serving.weight_store import WeightVersion
from rayk.signals.sequence import TokenSequence


@dataclass(frozen=True)
class ScoreRequest:
    """Sequences to score, packed into flat arrays.

    Attributes:
        input_ids: int32 [tokens], the ids of all sequences, one sequence after another.
        counted_bits: uint8 [⌈tokens / 8⌉], one bit per token: whether it is counted.
        lengths: int64 [sequences].
        requested: int32 [counted tokens, m], the requested ids of all sequences; None unless the support is
            `requested`.
    """

    input_ids: np.ndarray
    counted_bits: np.ndarray
    lengths: np.ndarray
    support: Support
    requested: np.ndarray | None = None

    @classmethod
    def from_sequences(cls, sequences: list[TokenSequence], support: Support) -> "ScoreRequest":
        """Pack `sequences` into a request for signals with `support`."""
        return cls(
            np.concatenate([sequence.input_ids for sequence in sequences]),
            np.packbits(np.concatenate([sequence.counted for sequence in sequences])),
            np.asarray([len(sequence) for sequence in sequences]),
            support,
            np.concatenate([s.requested for s in sequences if s.requested is not None])
            if isinstance(support, Requested) and sequences[0].requested is not None
            else None,
        )

    @property
    def tokens(self) -> int:
        """Number of tokens that the replica reads."""
        return len(self.input_ids)

    def sequences(self) -> list[TokenSequence]:
        """Unpack the sequences."""
        counted = np.unpackbits(self.counted_bits, count=len(self.input_ids)).astype(bool)
        ends = np.cumsum(self.lengths)[:-1]
        rows = zip(np.split(self.input_ids, ends), np.split(counted, ends), strict=True)
        if self.requested is None:
            return [TokenSequence(*row) for row in rows]
        counted_ends = np.cumsum([np.count_nonzero(row) for row in np.split(counted, ends)])[:-1]
        requested = np.split(self.requested, counted_ends)
        return [TokenSequence(*row, ids) for row, ids in zip(rows, requested, strict=True)]


@dataclass(frozen=True)
class GenerateRequest:
    """Prompts (text, token ids, or messages) to continue, each with its own seed."""

    prompts: list[Any]
    seeds: list[int]
    parameters: SamplingParameters = field(default_factory=SamplingParameters)

    @property
    def tokens(self) -> int:
        """Largest number of tokens that the replica generates."""
        return len(self.prompts) * self.parameters.max_new_tokens


@dataclass(frozen=True)
class VersionedRequest:
    """A request, and the weight version with which it must be answered."""

    version: WeightVersion
    request: GenerateRequest | ScoreRequest | None
    """None: a request without content."""

    @property
    def tokens(self) -> int:
        return 0 if self.request is None else self.request.tokens
