"""From rows to batches: read sources, tokenize rows and mark counted tokens, divide rows among steps and ranks."""

from rayk.data.batches import (
    Batch,
    BatchSampler,
    collate,
    get_pad_id,
    make_batches,
    micro_batches,
)
from rayk.data.examples import Example, ExampleTable
from rayk.data.sources import Row, read_rows
from rayk.data.tokenizing import RowTokenizer, tokenize

__all__ = [
    "Batch",
    "BatchSampler",
    "Example",
    "ExampleTable",
    "Row",
    "RowTokenizer",
    "collate",
    "get_pad_id",
    "make_batches",
    "micro_batches",
    "read_rows",
    "tokenize",
]
