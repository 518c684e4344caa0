"""ROUGE-L F between one text and many, for leaving out what has been said before (Self-Instruct, arXiv 2212.10560
§2.2).

F = 2·LCS(a, b) / (|a| + |b|) over words (`rayk.text.words`). A pool of N texts takes N²/2 comparisons; nearly all of
them are spared by bounds that hold exactly, so that no decision changes:

- F ≥ t needs LCS ≥ t(|a| + |b|)/2, and LCS ≤ min(|a|, |b|): lengths further apart than (2 − t)/t are out;
- LCS is at most the number of words two texts share, each as often as both have it. Two sets of m and n elements that
  share at least c share, in whatever common order, l ≤ c of them among the first m − c + l of the one and n − c + l of
  the other (prefix filtering: Chaudhuri et al., ICDE 2006). In the order of rarity few texts share some of the first.

What is left is compared by a bit-parallel LCS (RapidFuzz).
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
"""l; more takes longer to count and leaves fewer pairs to compare."""


@dataclass(frozen=True)
class SimilarText:
    """A text of a pool that is too much like the one asked about, and how much, of 1."""

    text: str
    score: float


def rouge_l(one: str, other: str) -> float:
    """ROUGE-L F of two texts, without stemming; 0 where either has no words."""
    first, second = words(one), words(other)
    return 2 * LCSseq.similarity(first, second) / (len(first) + len(second)) if first and second else 0.0


class RougeIndex:
    """A growing pool of texts that can be asked whether it has one with ROUGE-L F ≥ `threshold` to a new one.

    A text that is exactly at the threshold counts as similar: the paper keeps what is *below* 0.7, while the authors'
    code drops only what is above it. The comparison is exact, of whole numbers: 0.7 is 7/10, and 14/20 is not below it,
    whatever floating point makes of the two. Texts without words are like no other.
    """

    def __init__(self, threshold: float = 0.7, texts: Iterable[str] = ()):
        """
        Args:
            threshold: in (0, 1], read as the decimal that it is written as.
            texts: what the pool begins with.
        """
        if not 0 < threshold <= 1:
            raise InputError(f"A ROUGE-L threshold must be above 0 and at most 1, not {threshold}.")
        self._numerator, self._denominator = Fraction(str(threshold)).as_integer_ratio()
        self._texts: list[str] = []
        self._ids: dict[str, int] = {}
        self._sequences: list[tuple[int, ...]] = []
        # What has no rank yet is rarer than all that has: it was seen since ranks were given.
        self._ranks: dict[tuple[int, int], int] = {}
        self._postings: dict[tuple[int, int], list[int]] = {}
        self._next_reorder = _FIRST_REORDER
        for text in texts:
            self.add(text)

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, text: str) -> None:
        """Put `text` into the pool, similar or not."""
        sequence = tuple(self._ids.setdefault(word, len(self._ids)) for word in words(text))
        self._texts.append(text)
        self._sequences.append(sequence)
        self._post(len(self._texts) - 1)
        if len(self._texts) == self._next_reorder:
            self._reorder()

    def find(self, text: str) -> SimilarText | None:
        """The earliest text of the pool with F ≥ threshold to `text`; None where there is none."""
        unknown = len(self._ids)  # words that the pool does not have are like none of it
        sequence = tuple(self._ids.get(word, unknown) for word in words(text))
        for place in self._places_near(sequence):
            other = self._sequences[place]
            needed = self._common_needed(len(sequence) + len(other))
            common = LCSseq.similarity(sequence, other, score_cutoff=needed)
            if common >= needed:
                return SimilarText(self._texts[place], 2 * common / (len(sequence) + len(other)))
        return None

    def _places_near(self, sequence: tuple[int, ...]) -> list[int]:
        """The places in the pool of the texts that may be similar, in order."""
        shared: Counter[int] = Counter()
        for element in self._prefix(sequence):
            shared.update(self._postings.get(element, ()))
        shortest = self._shortest(len(sequence))
        least = min(_SHARED, self._common_needed(len(sequence) + shortest))
        return sorted(place for place, count in shared.items() if count >= least)

    def _common_needed(self, total: int) -> int:
        """The least LCS that makes F ≥ threshold of two sequences of `total` words together."""
        return -(-self._numerator * total // (2 * self._denominator))

    def _shortest(self, length: int) -> int:
        """How many words a text has at least that is similar to one of `length`."""
        return -(-self._numerator * length // (2 * self._denominator - self._numerator))

    def _prefix(self, sequence: tuple[int, ...]) -> list[tuple[int, int]]:
        """The rarest elements of the sequence; every similar text has `_SHARED` of them among its own, or all it needs.

        An element is a word and which of its occurrences it is, so that a bag of words becomes a set.
        """
        common = self._common_needed(len(sequence) + self._shortest(len(sequence)))
        seen: Counter[int] = Counter()
        elements = []
        for word in sequence:
            elements.append((word, seen[word]))
            seen[word] += 1
        elements.sort(key=self._rarity)
        return elements[: len(sequence) - common + _SHARED]

    def _rarity(self, element: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        return self._ranks.get(element, -1), element

    def _post(self, place: int) -> None:
        for element in self._prefix(self._sequences[place]):
            self._postings.setdefault(element, []).append(place)

    def _reorder(self) -> None:
        """Rank elements by how many texts have them, and index the pool anew; each time it has doubled."""
        self._next_reorder *= 2
        counts: Counter[tuple[int, int]] = Counter()
        for sequence in self._sequences:
            counts.update((word, nth) for word, count in Counter(sequence).items() for nth in range(count))
        self._ranks = {element: rank for rank, (element, _) in enumerate(sorted(counts.items(), key=_count_first))}
        self._postings = {}
        for place in range(len(self._texts)):
            self._post(place)


def _count_first(item: tuple[tuple[int, int], int]) -> tuple[int, tuple[int, int]]:
    element, count = item
    return count, element
