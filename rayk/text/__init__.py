"""Text alone, without models: words of any script, ROUGE-L among many texts, and the filters of quality control."""

from rayk.text.filters import Filter, Rejection, Sifted, build_filters, judge, sift
from rayk.text.rouge import RougeIndex, Similar, rouge_l
from rayk.text.words import normalize, words

__all__ = [
    "Filter",
    "Rejection",
    "RougeIndex",
    "Sifted",
    "Similar",
    "build_filters",
    "judge",
    "normalize",
    "rouge_l",
    "sift",
    "words",
]
