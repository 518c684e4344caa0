"""SQuAD's two measures of a short answer: exact match and F1 over words (Rajpurkar et al. 2016, arXiv 1606.05250).

Both normalize the texts as SQuAD's evaluation script: lower case, without ASCII punctuation, without the articles "a",
"an" and "the", with single spaces.
"""

import re
import string
from collections import Counter

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def exact_match(one: str, other: str) -> float:
    """Return 1 if two texts are equal after normalization, else 0."""
    return float(_tokens(one) == _tokens(other))


def f1(one: str, other: str) -> float:
    """Return the F1 of the words that two texts share; texts without words have 1 if both are, else 0."""
    first, second = _tokens(one), _tokens(other)
    if not first or not second:
        return float(first == second)
    return 2 * (Counter(first) & Counter(second)).total() / (len(first) + len(second))


def _tokens(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()
