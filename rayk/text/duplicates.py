"""Find near-duplicates among many texts, and texts that overlap with the evaluation set."""

from collections.abc import Iterable
from typing import Any

from rayk.text.rouge import SimilarText
from rayk.text.words import ngrams, words

_MAX_LSH_THRESHOLD = 0.95  # datasketch finds no division into bands for thresholds closer to 1


class NearDuplicates:
    """A growing pool of texts that finds a text similar to a new one: with Jaccard similarity ≥ `threshold` of their
    sets of word n-grams.

    MinHash LSH (datasketch) proposes texts, and their similarity is then computed exactly, so that there are no false
    duplicates. A pair may be missed: with 128 permutations and threshold 0.8, the hashes propose a pair of similarity
    0.8 with probability 0.87, of 0.85 with 0.98, of 0.9 with 0.999, and equal texts always. The same texts in the same
    order give the same decisions.
    """

    def __init__(self, threshold: float, n: int, permutations: int):
        """
        Args:
            threshold: in (0, 1].
            n: words in an n-gram; a text of fewer words is one n-gram.
            permutations: hashes per text.
        """
        from datasketch import MinHash, MinHashLSH

        self._threshold, self._n = threshold, n
        self._empty_hash = MinHash(num_perm=permutations, seed=1)
        self._lsh = MinHashLSH(threshold=min(threshold, _MAX_LSH_THRESHOLD), num_perm=permutations, weights=(0.1, 0.9))
        self._texts: list[str] = []

    def find(self, text: str) -> SimilarText | None:
        """Return the earliest similar text that the hashes propose, with its similarity; None if there is none."""
        shingles = self._shingles(text)
        for place in sorted(self._lsh.query(self._hash(shingles))) if shingles else ():
            others = self._shingles(self._texts[place])
            similarity = len(shingles & others) / len(shingles | others)
            if similarity >= self._threshold:
                return SimilarText(self._texts[place], similarity)
        return None

    def add(self, text: str) -> None:
        """Add `text` to the pool."""
        self._texts.append(text)
        shingles = self._shingles(text)
        if shingles:
            self._lsh.insert(len(self._texts) - 1, self._hash(shingles), check_duplication=False)

    def _shingles(self, text: str) -> set[str]:
        found = words(text)
        return {" ".join(gram) for gram in ngrams(found, min(self._n, len(found)))} if found else set()

    def _hash(self, shingles: Iterable[str]) -> Any:
        hashed = self._empty_hash.copy()
        hashed.update_batch([shingle.encode() for shingle in shingles])
        return hashed


class Contamination:
    """Word n-grams of the evaluation set's prompts."""

    def __init__(self, texts: Iterable[str], n: int):
        self._n = n
        self._grams: set[tuple[str, ...]] = set()
        self._short: set[tuple[str, ...]] = set()
        for text in texts:
            found = words(text)
            if len(found) >= n:
                self._grams.update(ngrams(found, n))
            elif found:
                self._short.add(tuple(found))

    def find(self, text: str) -> str | None:
        """Return the first n-gram that `text` shares with the evaluation set; None if there is none."""
        found = words(text)
        if tuple(found) in self._short:
            return " ".join(found)
        return next((" ".join(gram) for gram in ngrams(found, self._n) if gram in self._grams), None)
