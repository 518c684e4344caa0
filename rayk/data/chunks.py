"""Plain text as one sequence of tokens, cut into chunks of equal length: at the same places in each pass, or in each
pass at another random offset, as BabyLlama (arXiv 2308.02019) trains its models."""

from functools import cached_property
from typing import Protocol

import numpy as np

from rayk.config import DataSource
from rayk.data.examples import Example, ExampleTable
from rayk.errors import InputError


class TrainingRows(Protocol):
    """The rows of a run, by their numbers in a `BatchSampler`."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...
    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each row of a pass."""
        ...


def cut_into_chunks(table: ExampleTable, source: DataSource, section: str) -> ExampleTable:
    """Return the texts of `table`, one after the other, in rows of `source.chunk_tokens` tokens, of which the last may
    be shorter; `table` itself without this setting. All tokens of a chunk but its first are counted.

    Args:
        section: prefix of the source's settings in error messages.

    Raises:
        InputError: the rows are no plain text.
    """
    if source.chunk_tokens is None:
        return table
    if table.prompt_tokens.any() or table.has_pairs:
        raise InputError(
            f"{section}chunk_tokens cuts plain text, but the rows of '{source.path}' have prompts; leave it out, or "
            "give rows with a field of text."
        )
    ids, tokens = table.token_ids, source.chunk_tokens
    starts = range(0, max(1, len(ids) - 1), tokens)  # a last chunk of one token would have nothing to predict
    chunks = (ids[start : start + tokens] for start in starts)
    examples = (
        _make_example(chunk, f"{source.path}, token {start + 1:,}") for start, chunk in zip(starts, chunks, strict=True)
    )
    return ExampleTable.from_examples(examples, table.skipped, table.ends)


class OffsetChunks:
    """The chunks of all passes over a text. Pass p begins at a random one of the first `tokens` tokens and has full
    chunks only; its chunk c is row p·len + c.

    Args:
        table: the text in chunks, as `cut_into_chunks` returns it.
        tokens: tokens of a chunk.
        seed: a non-negative number; the offset depends on it and the pass alone.

    Raises:
        InputError: the text is too short.
    """

    def __init__(self, table: ExampleTable, tokens: int, seed: int):
        self._ids, self._tokens, self._seed = table.token_ids, tokens, seed
        self._count = (len(self._ids) - tokens + 1) // tokens
        if self._count < 1:
            raise InputError(
                f"The text has {len(self._ids):,} tokens, too few for chunks of {tokens} from a random offset; lower "
                "data.train.chunk_tokens, or set random_offset to false."
            )

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Example:
        number, chunk = divmod(int(index), self._count)
        start = self._offset(number) + chunk * self._tokens
        return _make_example(self._ids[start : start + self._tokens], f"pass {number + 1}, token {start + 1:,}")

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.full(self._count, self._tokens)

    def _offset(self, number: int) -> int:
        return int(np.random.Philox(np.random.SeedSequence([self._seed, number])).random_raw() % self._tokens)


def open_rows(table: ExampleTable, source: DataSource | None, seed: int) -> TrainingRows:
    """Return the rows to train on: those of the table, or with `random_offset` the chunks of all passes.

    Raises:
        InputError: as `OffsetChunks`.
    """
    if source is None or not source.random_offset:
        return table
    assert source.chunk_tokens is not None
    return OffsetChunks(table, source.chunk_tokens, seed)


def _make_example(ids: np.ndarray, where: str) -> Example:
    return Example(ids, np.arange(len(ids)) > 0, where=where)
