"""A retriever trained to find the demonstrations that help a teacher most (LLM-R, arXiv 2307.07164)."""

from rayk.retrieval.retriever import find_retriever, retriever_summary, train_retriever
from rayk.retrieval.rounds import check_retriever

__all__ = ["check_retriever", "find_retriever", "retriever_summary", "train_retriever"]
