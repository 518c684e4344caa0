"""ROUGE-L F between one text and many, to reject similar texts (Self-Instruct, arXiv 2212.10560, §2.2).

F = 2·LCS(a, b) / (|a| + |b|) over words (`rayk.text.words`). A pool of N texts takes N²/2 comparisons; exact bounds
avoid nearly all of them without changing a decision:

- F ≥ t requires LCS ≥ t(|a| + |b|)/2, and LCS ≤ min(|a|, |b|), so the ratio of the lengths is at most (2 − t)/t;
- LCS is at most the number of words that two texts share, counted with multiplicity. Two sets of m and n elements that
  share at least c elements share, in any common order, l ≤ c of them among the first m − c + l of the one and
  n − c + l of the other (prefix filtering: Chaudhuri et al., ICDE 2006). Ordered by rarity, few texts share any of the
  first elements.

The remaining pairs are compared by a bit-parallel LCS (RapidFuzz).
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from rapidfuzz.distance import LCSseq

from rayk.errors import InputError
from rayk.text.words import words

_FIRST_REORDER = 256
_SHARED = 4
"""l; a larger value takes longer to count and leaves fewer pairs to compare."""


@dataclass(frozen=True)
class SimilarText:
    """A text of a pool that is similar to another, with the similarity in [0, 1]."""

    text: str
    score: float


def rouge_l(one: str, other: str) -> float:
    """Compute ROUGE-L F of two texts, without stemming; 0 if either has no words."""
    first, second = words(one), words(other)
    return 2 * LCSseq.similarity(first, second) / (len(first) + len(second)) if first and second else 0.0


class RougeIndex:
    """A growing pool of texts that finds a text with ROUGE-L F ≥ `threshold` to a new one.

    F equal to the threshold counts as similar: the paper keeps texts *below* 0.7, while the authors' code drops only
    texts above it. The comparison is exact, in integers, so that rounding of floats has no effect: 0.7 is 7/10, and
    14/20 is not below it. Texts without words are not similar to any text.
    """

    def __init__(self, threshold: float = 0.7, texts: Iterable[str] = ()):
        """
        Args:
            threshold: in (0, 1]; its decimal notation is converted to an exact fraction.
            texts: initial pool.
        """
        if not 0 < threshold <= 1:
            raise InputError(f"A ROUGE-L threshold must be above 0 and at most 1, not {threshold}.")
        self._numerator, self._denominator = Fraction(str(threshold)).as_integer_ratio()
        self._texts: list[str] = []
        self._ids: dict[str, int] = {}
        self._sequences: list[tuple[int, ...]] = []
        # Elements without a rank are new since the last ranking, and count as rarer than those with one.
        self._ranks: dict[tuple[int, int], int] = {}
        self._postings: dict[tuple[int, int], list[int]] = {}
        self._next_reorder = _FIRST_REORDER
        for text in texts:
            self.add(text)

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, text: str) -> None:
        """Add `text` to the pool, similar or not."""
        sequence = tuple(self._ids.setdefault(word, len(self._ids)) for word in words(text))
        self._texts.append(text)
        self._sequences.append(sequence)
        self._post(len(self._texts) - 1)
        if len(self._texts) == self._next_reorder:
            self._reorder()

    def find(self, text: str) -> SimilarText | None:
        """Return the earliest text of the pool with F ≥ threshold to `text`; None if there is none."""
        unknown = len(self._ids)  # words that are not in the pool match none of it
        sequence = tuple(self._ids.get(word, unknown) for word in words(text))
        for index in self._candidates(sequence):
            other = self._sequences[index]
            needed = self._min_common(len(sequence) + len(other))
            common = LCSseq.similarity(sequence, other, score_cutoff=needed)
            if common >= needed:
                return SimilarText(self._texts[index], 2 * common / (len(sequence) + len(other)))
        return None

    def _candidates(self, sequence: tuple[int, ...]) -> list[int]:
        """Return the indices of the texts that may be similar, in order."""
        shared: Counter[int] = Counter()
        for element in self._prefix(sequence):
            shared.update(self._postings.get(element, ()))
        shortest = self._min_length(len(sequence))
        least = min(_SHARED, self._min_common(len(sequence) + shortest))
        return sorted(index for index, count in shared.items() if count >= least)

    def _min_common(self, total: int) -> int:
        """Return the smallest LCS with F ≥ threshold for two sequences with `total` words together."""
        return -(-self._numerator * total // (2 * self._denominator))

    def _min_length(self, length: int) -> int:
        """Return the smallest number of words of a text that is similar to one of `length` words."""
        return -(-self._numerator * length // (2 * self._denominator - self._numerator))

    def _prefix(self, sequence: tuple[int, ...]) -> list[tuple[int, int]]:
        """Return the rarest elements of the sequence. The prefixes of similar texts share `_SHARED` elements, or all
        that similarity requires.

        An element is a word with the number of its occurrence in the text, so that a bag of words becomes a set.
        """
        common = self._min_common(len(sequence) + self._min_length(len(sequence)))
        seen: Counter[int] = Counter()
        elements = []
        for word in sequence:
            elements.append((word, seen[word]))
            seen[word] += 1
        elements.sort(key=self._rarity)
        return elements[: len(sequence) - common + _SHARED]

    def _rarity(self, element: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        return self._ranks.get(element, -1), element

    def _post(self, index: int) -> None:
        for element in self._prefix(self._sequences[index]):
            self._postings.setdefault(element, []).append(index)

    def _reorder(self) -> None:
        """Rank elements by the number of texts that contain them, and rebuild the index. Called whenever the pool has
        doubled."""
        self._next_reorder *= 2
        counts: Counter[tuple[int, int]] = Counter()
        for sequence in self._sequences:
            counts.update((word, nth) for word, count in Counter(sequence).items() for nth in range(count))
        self._ranks = {element: rank for rank, (element, _) in enumerate(sorted(counts.items(), key=_count_first))}
        self._postings = {}
        for index in range(len(self._texts)):
            self._post(index)


def _count_first(item: tuple[tuple[int, int], int]) -> tuple[int, tuple[int, int]]:
    element, count = item
    return count, element
