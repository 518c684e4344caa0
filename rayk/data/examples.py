"""Tokenized rows, and the Arrow table in which the workers of a node share them."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from rayk.errors import InputError
from rayk.signals.alignment import AlignedView
from rayk.signals.sequence import TokenSequence

EVERY_TEACHER = "*"
"""Key in `Example.contexts` of the context for all teachers that have no context under their own name."""

_CHUNK_ROWS = 1000
_SKIPPED = b"rayk.skipped"
_ENDS = b"rayk.ends"
# large lists: the tokens of a corpus overflow the 32-bit offsets of plain lists
_SCHEMA = pa.schema(
    [
        ("input_ids", pa.large_list(pa.int32())),
        ("counted", pa.large_list(pa.bool_())),
        ("rejected_ids", pa.large_list(pa.int32())),
        ("prompt_tokens", pa.int32()),
        ("where", pa.string()),
        ("fields", pa.string()),
    ]
)


@dataclass(frozen=True, eq=False)
class Example(TokenSequence):
    """A tokenized row, as the student reads it.

    Attributes:
        input_ids: int32 [length].
        counted: bool [length], True at the tokens that enter the loss; all False for a prompt without completion.
        prompt_tokens: number of leading ids that are the prompt; 0 for plain text.
        where: place of the row, for error messages ("train.jsonl, line 17").
        fields: the fields of the row as read.
        rejected: for a preference row, the rejected answer after the same prompt; the row itself is the chosen one.
        contexts: token ids that teachers read instead of the prompt, int32 [length] each, by the teacher's name or
            `EVERY_TEACHER`. Not stored in `ExampleTable`; see `rayk.data.views`.
        aligned: the row in the tokens of teachers with another tokenizer, by the teacher's name. Not stored either; see
            `rayk.data.alignment`.
    """

    prompt_tokens: int = 0
    where: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    rejected: "Example | None" = None
    contexts: Mapping[str, np.ndarray] = field(default_factory=dict)
    aligned: Mapping[str, AlignedView] = field(default_factory=dict)

    def view(self, reader: str) -> TokenSequence:
        """Return the row as the teacher `reader` reads it: in the teacher's tokens if it has another tokenizer, with
        the teacher's context instead of the prompt, or unchanged.

        Views align by counted index: the tokens after the prompt, which include all counted ones, are the same in all
        views but aligned ones, whose `AlignedView.groups` relate both counted indices.

        Raises:
            InputError: a token of the prompt is counted, which the teacher's context would replace.
        """
        if reader in self.aligned:
            return self.aligned[reader].sequence
        context = self.contexts.get(reader, self.contexts.get(EVERY_TEACHER))
        if context is None:
            return self
        if self.counted[: self.prompt_tokens].any():
            raise InputError(
                f"{self.where or 'A row'} has counted tokens in its prompt, which teacher '{reader}' does not read, so "
                "its signals would belong to other tokens; count tokens of the completion only."
            )
        ids = np.concatenate([context, self.input_ids[self.prompt_tokens :]])
        counted = np.concatenate([np.zeros(len(context), bool), self.counted[self.prompt_tokens :]])
        return Example(ids, counted, self.requested, len(context), self.where, self.fields)

    @property
    def answers(self) -> "list[Example]":
        """The row itself, followed by its rejected answer if it has one."""
        return [self] if self.rejected is None else [self, self.rejected]

    @property
    def prompt_ids(self) -> np.ndarray:
        """Token ids of the prompt, int32 [prompt_tokens]."""
        return self.input_ids[: self.prompt_tokens]


class ExampleTable:
    """Examples in Arrow columns, read without copying, so that the workers of a node share one table in memory.

    Columns: input_ids large_list<int32>, counted large_list<bool>, rejected_ids large_list<int32> (empty except for
    preference pairs), prompt_tokens int32, where string, fields string (JSON). The schema's metadata contain the number
    of skipped rows by reason, and the ends of the completions.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table.combine_chunks()

    @classmethod
    def from_examples(
        cls, examples: Iterable[Example], skipped: Mapping[str, int] | None = None, ends: Collection[int] = ()
    ) -> "ExampleTable":
        """Build a table. `skipped` and `ends` are read after the last example, so the iterator `examples` may add to
        them."""
        remaining, parts = iter(examples), []
        while chunk := list(islice(remaining, _CHUNK_ROWS)):
            parts.append(_record_batch(chunk))
        return cls.from_table(pa.Table.from_batches(parts, _SCHEMA), skipped or {}, ends)

    @classmethod
    def from_table(cls, table: pa.Table, skipped: Mapping[str, int], ends: Collection[int]) -> "ExampleTable":
        """Return the examples of an Arrow table with the class's columns, with the given metadata."""
        metadata = {_SKIPPED: json.dumps(dict(skipped)), _ENDS: json.dumps(sorted(ends))}
        return cls(table.replace_schema_metadata(metadata))

    def __reduce__(self) -> tuple[Any, ...]:
        return ExampleTable, (self.table,)

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> Example:
        """Return example `index` (negative: from the end); `input_ids` is a read-only view of the table."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        index = int(index) % len(self)
        start, end = int(self._offsets[index]), int(self._offsets[index + 1])
        where, fields = (self.table.column(name)[index].as_py() for name in ("where", "fields"))
        counted = self._counted.slice(start, end - start).to_numpy(zero_copy_only=False)
        chosen = Example(self._ids[start:end], counted, None, int(self.prompt_tokens[index]), where, json.loads(fields))
        start, end = int(self._rejected_offsets[index]), int(self._rejected_offsets[index + 1])
        if start == end:
            return chosen
        after_prompt = np.arange(end - start) >= max(1, chosen.prompt_tokens)
        rejected = replace(chosen, input_ids=self._rejected_ids[start:end], counted=after_prompt)
        return replace(chosen, rejected=rejected)

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def find_token(self, is_wanted: Callable[[np.ndarray], np.ndarray]) -> tuple[str, int] | None:
        """Return the place of the first row that contains a token id for which `is_wanted` is true, and the id; None if
        no row contains one."""
        for ids, offsets in ((self._ids, self._offsets), (self._rejected_ids, self._rejected_offsets)):
            found = np.flatnonzero(is_wanted(ids))
            if len(found):
                row = int(np.searchsorted(offsets, found[0], side="right")) - 1
                return self.table.column("where")[row].as_py(), int(ids[found[0]])
        return None

    @property
    def token_ids(self) -> np.ndarray:
        """The ids of all examples, one after the other (of pairs, of the chosen answers), int32 [tokens]."""
        return self._ids

    @property
    def has_pairs(self) -> bool:
        """Return whether the examples are preference pairs."""
        return len(self._rejected_ids) > 0

    @property
    def skipped(self) -> dict[str, int]:
        """Number of skipped rows, by reason."""
        return json.loads((self.table.schema.metadata or {}).get(_SKIPPED, b"{}"))

    @property
    def ends(self) -> tuple[int, ...]:
        """Ids of the special tokens with which the rows' completions end; for rows without completions, those with
        which a completion would end."""
        return tuple(json.loads((self.table.schema.metadata or {}).get(_ENDS, b"[]")))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each example, of both answers for a pair, int64 [examples]."""
        return np.diff(self._offsets) + np.diff(self._rejected_offsets)

    @cached_property
    def longest(self) -> int:
        """Number of tokens of the longest sequence."""
        return int(max(np.diff(self._offsets).max(), np.diff(self._rejected_offsets).max()))

    @cached_property
    def counted_tokens(self) -> np.ndarray:
        """Number of counted tokens of each example, of both answers for a pair, int64 [examples]."""
        counted = self._counted.to_numpy(zero_copy_only=False)
        before = np.concatenate(([0], np.cumsum(counted, dtype=np.int64)))
        chosen = before[self._offsets[1:]] - before[self._offsets[:-1]]
        return chosen + (np.diff(self._rejected_offsets) - np.maximum(1, self.prompt_tokens)).clip(min=0)

    @cached_property
    def prompt_tokens(self) -> np.ndarray:
        """Number of prompt tokens of each example, int32 [examples]."""
        return self.table.column("prompt_tokens").to_numpy()

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the tokens, the counted positions and the order of the rows; independent of file names."""
        digest = hashlib.sha256()
        counted = np.packbits(self._counted.to_numpy(zero_copy_only=False))
        parts = [self._ids, counted, self.lengths, self.prompt_tokens]
        if len(self._rejected_ids):
            parts += [self._rejected_ids, self._rejected_offsets]
        for part in parts:
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()[:16]

    @cached_property
    def _offsets(self) -> np.ndarray:
        return _chunk(self.table, "input_ids").offsets.to_numpy()

    @cached_property
    def _ids(self) -> np.ndarray:
        return _chunk(self.table, "input_ids").values.to_numpy()

    @cached_property
    def _rejected_offsets(self) -> np.ndarray:
        return _chunk(self.table, "rejected_ids").offsets.to_numpy()

    @cached_property
    def _rejected_ids(self) -> np.ndarray:
        return _chunk(self.table, "rejected_ids").values.to_numpy()

    @cached_property
    def _counted(self) -> pa.BooleanArray:
        return _chunk(self.table, "counted").values


def _record_batch(examples: list[Example]) -> pa.RecordBatch:
    empty = np.zeros(0, np.int32)
    columns = [
        _lists([row.input_ids for row in examples], pa.int32()),
        _lists([row.counted for row in examples], pa.bool_()),
        _lists([empty if row.rejected is None else row.rejected.input_ids for row in examples], pa.int32()),
        pa.array([row.prompt_tokens for row in examples], pa.int32()),
        pa.array([row.where for row in examples], pa.string()),
        pa.array([json.dumps(dict(row.fields), default=str) for row in examples], pa.string()),
    ]
    return pa.record_batch(columns, schema=_SCHEMA)


def _lists(parts: list[np.ndarray], kind: pa.DataType) -> pa.LargeListArray:
    offsets = pa.array(np.concatenate(([0], np.cumsum([len(part) for part in parts]))), pa.int64())
    return pa.LargeListArray.from_arrays(offsets, pa.array(np.concatenate(parts), kind))


def _chunk(table: pa.Table, name: str) -> pa.Array:
    chunked = table.column(name)
    return chunked.chunk(0) if chunked.num_chunks else pa.array([], chunked.type)
