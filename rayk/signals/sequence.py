"""`TokenSequence`: token ids, and which of them are counted. `rayk.data` creates sequences, engines score them."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """One sequence of tokens as a model reads it.

    Attributes:
        input_ids: int32 [length].
        counted: bool [length], True where the token enters the loss; never at position 0, which has no prediction.
        requested: int32 [counted tokens, m], the ids whose log-probs a teacher returns (support `requested`); -1 means
            no id.

    Raises:
        ValueError: the shapes differ, or position 0 is counted.
    """

    input_ids: np.ndarray
    counted: np.ndarray
    requested: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.input_ids.ndim != 1 or self.input_ids.shape != self.counted.shape:
            raise ValueError(
                f"a sequence needs input_ids and counted of one length, not {self.input_ids.shape} and "
                f"{self.counted.shape}"
            )
        if len(self.counted) and self.counted[0]:
            raise ValueError("position 0 of a sequence cannot be counted: no token is before it to predict it from")
        if self.requested is not None and (self.requested.ndim != 2 or len(self.requested) != self.counted_tokens):
            raise ValueError(
                f"a sequence with {self.counted_tokens} counted tokens needs requested ids of shape "
                f"[{self.counted_tokens}, m], not {list(self.requested.shape)}"
            )

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def counted_tokens(self) -> int:
        """Number of counted tokens."""
        return int(np.count_nonzero(self.counted))

    @property
    def targets(self) -> np.ndarray:
        """The counted tokens, int32 [counted_tokens]."""
        return self.input_ids[self.counted]

    def view(self, reader: str) -> "TokenSequence":
        """Return the sequence as the model named `reader` reads it. All views have the same counted tokens, except
        those of readers with another tokenizer (`rayk.signals.alignment`)."""
        return self
