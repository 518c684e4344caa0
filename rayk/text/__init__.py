"""Text alone, without models: words of any script, ROUGE-L among many texts, and the filters of quality control."""

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
