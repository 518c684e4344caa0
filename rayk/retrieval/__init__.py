"""A retriever that learns which demonstrations help a teacher (LLM-R, arXiv 2307.07164)."""

from rayk.retrieval.kept import found_retriever, learned_retriever, retriever_summary
from rayk.retrieval.learning import check_retriever

__all__ = ["check_retriever", "found_retriever", "learned_retriever", "retriever_summary"]
