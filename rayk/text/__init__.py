"""Text processing without models: words of any script, ROUGE-L, filters, answers, and the loading of users' code."""

from rayk.text.filters import Filter, FilterResult, Rejection, apply_filters, build_filters, find_rejection
from rayk.text.rouge import RougeIndex, SimilarText, rouge_l
from rayk.text.words import normalize, words

__all__ = [
    "Filter",
    "FilterResult",
    "Rejection",
    "RougeIndex",
    "SimilarText",
    "apply_filters",
    "build_filters",
    "find_rejection",
    "normalize",
    "rouge_l",
    "words",
]
