"""`ScoringTask`: which signals of a prompt vLLM's workers return.

It travels in a request's `SamplingParams.extra_args`, so it consists of plain values that msgpack can encode.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from rayk.config.support import Requested, Sampled, Support
from rayk.engines.reduce import sequence_seed
from rayk.signals.sequence import TokenSequence

KEY = "rayk"
"""The task's key in `extra_args`."""
_SUPPORT: TypeAdapter[Support] = TypeAdapter(Support)


@dataclass(frozen=True)
class ScoringTask:
    """The positions of one prompt at which signals are computed.

    Attributes:
        positions: int64 [counted tokens], ascending; position i has the distribution of token i + 1.
        targets: int64 [counted tokens], the counted tokens.
        vocab_size: number of leading ids that signals are over.
        requested: int64 [counted tokens, m], -1 for no id; None unless the support is `requested`.
        seed: the sequence's seed of support `sampled`.
    """

    support: Support
    vocab_size: int
    positions: np.ndarray
    targets: np.ndarray
    requested: np.ndarray | None = None
    seed: int = 0

    @classmethod
    def from_sequence(cls, sequence: TokenSequence, support: Support, vocab_size: int) -> "ScoringTask":
        """Return the task of the counted tokens of `sequence`."""
        requested = sequence.requested if isinstance(support, Requested) else None
        return cls(
            support, vocab_size, np.flatnonzero(sequence.counted) - 1, sequence.targets.astype(np.int64),
            None if requested is None else requested.astype(np.int64),
            sequence_seed(sequence) if isinstance(support, Sampled) else 0,
        )  # fmt: skip

    def to_arguments(self) -> dict[str, Any]:
        """Return the value of `extra_args`."""
        fields = {
            "support": asdict(self.support), "vocab_size": self.vocab_size, "seed": self.seed,
            "positions": self.positions.astype("<i4").tobytes(), "targets": self.targets.astype("<i4").tobytes(),
        }  # fmt: skip
        if self.requested is not None:
            fields |= {"requested": self.requested.astype("<i4").tobytes(), "width": self.requested.shape[1]}
        return {KEY: fields}

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any] | None) -> "ScoringTask | None":
        """Return the task in `extra_args`; None if there is none."""
        fields = (arguments or {}).get(KEY)
        if fields is None:
            return None

        def read(name: str) -> np.ndarray:
            return np.frombuffer(fields[name], "<i4").astype(np.int64)

        requested = read("requested").reshape(-1, fields["width"]) if "requested" in fields else None
        support = _SUPPORT.validate_python(fields["support"])
        return cls(support, fields["vocab_size"], read("positions"), read("targets"), requested, fields["seed"])
