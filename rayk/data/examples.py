"""Rows ready for a model, and the Arrow table in which every worker shares them."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from rayk.signals.sequence import TokenSequence

EVERY_TEACHER = "*"
"""Reader of a context that all teachers read for which the row has no context of their own."""

_CHUNK_ROWS = 1000
_SKIPPED = b"rayk.skipped"
# large lists: the tokens of a whole corpus overflow the 32-bit offsets of plain ones
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
    """A row ready for a model.

    Attributes:
        input_ids: int32 [length].
        counted: bool [length], the tokens to learn; none of them for a prompt alone.
        prompt_tokens: the first so many ids are the prompt, from which evaluation generates; 0 for plain text.
        where: the row's place in words, for messages.
        fields: the row as it was read.
        rejected: of a preference row, whose chosen answer this is, the other answer after the same prompt.
        contexts: what other readers read instead of the prompt, int32 [length] each, by a teacher's name or
            `EVERY_TEACHER`. Not stored in `ExampleTable`; see `rayk.data.views`.
    """

    prompt_tokens: int = 0
    where: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    rejected: "Example | None" = None
    contexts: Mapping[str, np.ndarray] = field(default_factory=dict)

    def view(self, reader: str) -> "Example":
        """The row as the model named `reader` reads it: after the reader's context, or unchanged where it has none.

        Views align by counted index: the tokens after the prompt, the counted ones among them, are the same in each.
        """
        context = self.contexts.get(reader, self.contexts.get(EVERY_TEACHER))
        if context is None:
            return self
        ids = np.concatenate([context, self.input_ids[self.prompt_tokens :]])
        counted = np.concatenate([np.zeros(len(context), bool), self.counted[self.prompt_tokens :]])
        return Example(ids, counted, self.requested, len(context), self.where, self.fields)

    @property
    def answers(self) -> "list[Example]":
        """The row as it is, and behind it its rejected answer if it has one."""
        return [self] if self.rejected is None else [self, self.rejected]

    @property
    def prompt_ids(self) -> np.ndarray:
        """int32 [prompt_tokens]."""
        return self.input_ids[: self.prompt_tokens]


class ExampleTable:
    """Examples in Arrow columns, read without copying, so that the workers of a node share one in memory.

    Columns: input_ids large_list<int32>, counted large_list<bool>, rejected_ids large_list<int32> (empty but for
    preference pairs), prompt_tokens int32, where string, fields string (JSON). The reasons for skipped rows travel in
    the schema's metadata.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table.combine_chunks()

    @classmethod
    def from_examples(cls, examples: Iterable[Example], skipped: Mapping[str, int] | None = None) -> "ExampleTable":
        """A table of the examples. `skipped` is read after the last example, so it may fill meanwhile."""
        remaining, parts = iter(examples), []
        while chunk := list(islice(remaining, _CHUNK_ROWS)):
            parts.append(_record_batch(chunk))
        table = pa.Table.from_batches(parts, _SCHEMA)
        return cls(table.replace_schema_metadata({_SKIPPED: json.dumps(dict(skipped or {}))}))

    def __reduce__(self) -> tuple[Any, ...]:
        return ExampleTable, (self.table,)

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> Example:
        """Example `index` (negative from the end); `input_ids` is a read-only view of the table."""
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

    @property
    def skipped(self) -> dict[str, int]:
        """How many rows were skipped, by reason."""
        return json.loads((self.table.schema.metadata or {}).get(_SKIPPED, b"{}"))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, of both answers of a pair, int64 [examples]."""
        return np.diff(self._offsets) + np.diff(self._rejected_offsets)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(max(np.diff(self._offsets).max(), np.diff(self._rejected_offsets).max()))

    @cached_property
    def counted_tokens(self) -> np.ndarray:
        """Counted tokens of each example, of both answers of a pair, int64 [examples]."""
        counted = self._counted.to_numpy(zero_copy_only=False)
        before = np.concatenate(([0], np.cumsum(counted, dtype=np.int64)))
        chosen = before[self._offsets[1:]] - before[self._offsets[:-1]]
        return chosen + (np.diff(self._rejected_offsets) - np.maximum(1, self.prompt_tokens)).clip(min=0)

    @cached_property
    def prompt_tokens(self) -> np.ndarray:
        """Prompt tokens of each example, int32 [examples]."""
        return self.table.column("prompt_tokens").to_numpy()

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the tokens, the counted positions and the order; the same data has it wherever it lies."""
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
    nothing = np.zeros(0, np.int32)
    columns = [
        _lists([each.input_ids for each in examples], pa.int32()),
        _lists([each.counted for each in examples], pa.bool_()),
        _lists([nothing if each.rejected is None else each.rejected.input_ids for each in examples], pa.int32()),
        pa.array([each.prompt_tokens for each in examples], pa.int32()),
        pa.array([each.where for each in examples], pa.string()),
        pa.array([json.dumps(dict(each.fields), default=str) for each in examples], pa.string()),
    ]
    return pa.record_batch(columns, schema=_SCHEMA)


def _lists(parts: list[np.ndarray], kind: pa.DataType) -> pa.LargeListArray:
    offsets = pa.array(np.concatenate(([0], np.cumsum([len(part) for part in parts]))), pa.int64())
    return pa.LargeListArray.from_arrays(offsets, pa.array(np.concatenate(parts), kind))


def _chunk(table: pa.Table, name: str) -> pa.Array:
    chunked = table.column(name)
    return chunked.chunk(0) if chunked.num_chunks else pa.array([], chunked.type)
