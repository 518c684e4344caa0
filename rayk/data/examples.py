"""Rows into examples, once, on the driver; and the Arrow table in which every worker shares them."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from rayk.config import DataConfig, DataSource
from rayk.data.prompts import Format, RowTexts
from rayk.data.sources import Row, read_rows
from rayk.data.tokens import Encoder, Tokens
from rayk.errors import InputError
from rayk.sequences import Sequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

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
class Example(Sequence):
    """A row ready for a model.

    Attributes:
        input_ids: int32 [length].
        counted: bool [length], the tokens to learn; none of them for a prompt alone.
        prompt_tokens: the first so many ids are the prompt, from which evaluation generates; 0 for plain text.
        where: the row's place in words, for messages.
        fields: the row as it was read.
        rejected: of a preference row, whose chosen answer this is, the other answer after the same prompt.
    """

    prompt_tokens: int = 0
    where: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    rejected: "Example | None" = None

    @property
    def answers(self) -> "list[Example]":
        """The row as it is, and behind it its rejected answer if it has one."""
        return [self] if self.rejected is None else [self, self.rejected]

    @property
    def prompt_ids(self) -> np.ndarray:
        """int32 [prompt_tokens]."""
        return self.input_ids[: self.prompt_tokens]


class RowTokenizer:
    """Turns the rows of one source into examples; rows that cannot be used are counted in `skipped` by reason.

    Args:
        source: the fields and format.
        data: the limits on length, and whether prompts are wrapped in the chat template.
        tokenizer: a transformers tokenizer with an EOS token.
        prompts_only: make examples of the prompts alone, with no counted token: for students and teachers that write
            the completions themselves. Completions are then not read.
        pairs: make preference pairs unless the source's format says otherwise.
        section: how errors name the source's settings.
    """

    def __init__(
        self,
        source: DataSource,
        data: DataConfig,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        prompts_only: bool = False,
        pairs: bool = False,
        section: str | None = None,
    ) -> None:
        if section is None:
            section = "data.evaluation." if source is data.evaluation else "data.train."
        self.source, self.data, self.prompts_only, self.pairs = source, data, prompts_only, pairs
        self.texts = RowTexts(source, section)
        self.encoder = Encoder(tokenizer)
        self.format: Format | None = None
        self.skipped: Counter[str] = Counter()
        self.first_skipped: dict[str, str] = {}

    def examples(self, rows: Iterable[Row]) -> Iterator[Example]:
        """The usable rows as examples, in order.

        Raises:
            InputError: a row lacks its fields, is malformed, or is too long where `too_long` is `error`.
        """
        remaining = iter(rows)
        while chunk := list(islice(remaining, _CHUNK_ROWS)):
            encoded = self._encode_pairs(chunk) if self._makes_pairs(chunk[0]) else self._encode(chunk)
            for row, tokens in zip(chunk, encoded, strict=True):
                if tokens is not None and (example := self._row(row, tokens)) is not None:
                    yield example

    def prompt_of(self, row: Row) -> np.ndarray:
        """The prompt's ids, int32 [prompt_tokens]: what a model is given to write this row's (last) completion.

        Raises:
            InputError: the row is plain text, which has no prompt, or lacks its fields.
        """
        tokens = self._encode_prompts([row])[0]
        return np.asarray(tokens.input_ids, dtype=np.int32)

    def _encode(self, rows: list[Row]) -> list[Tokens | None]:
        """The tokens of each row, None where it was skipped."""
        if self.prompts_only:
            return list(self._encode_prompts(rows))
        form = self._format(rows[0])
        if form == "messages":
            return [self._encode_messages(row, self.texts.messages(row)) for row in rows]
        if form == "text":
            texts = [self.texts.text(row) for row in rows]
            return self._unless_empty(rows, texts, "text", self.encoder.texts(texts))
        if self.data.chat_template:
            return [self._encode_messages(row, self._as_messages(row)) for row in rows]
        prompts, completions = [self.texts.prompt(row) for row in rows], [self.texts.completion(row) for row in rows]
        return self._unless_empty(rows, completions, "completion", self.encoder.pairs(prompts, completions))

    def _encode_prompts(self, rows: list[Row]) -> list[Tokens]:
        form = self._format(rows[0])
        if form == "text":
            raise InputError(
                f"{rows[0].where} is plain text, which has no prompt to generate from; give rows with prompts, or set "
                f"{self.texts.section}format."
            )
        if form == "messages":
            prompts = [self._chat_prompt(row, self.texts.messages(row)) for row in rows]
        elif form == "preference" and self.texts.has_conversations(rows[0]):
            prompts = [self._chat_prompt(row, self.texts.conversations(row)[0]) for row in rows]
        elif self.data.chat_template:
            prompts = [self._chat_prompt(row, [self._user_message(row)]) for row in rows]
        else:
            prompts = self.encoder.prompts([self.texts.prompt(row) for row in rows])
        return [Tokens(ids, [], len(ids)) for ids in prompts]

    def _format(self, row: Row) -> Format:
        if self.format is None:
            self.format = self.texts.format_of(row, prompts_only=self.prompts_only, pairs=self.pairs)
        return self.format

    def _makes_pairs(self, row: Row) -> bool:
        return self._format(row) == "preference" and not self.prompts_only

    def _encode_pairs(self, rows: list[Row]) -> list[tuple[Tokens, Tokens] | None]:
        """The tokens of each row's chosen and rejected answer after their prompt, None where it was skipped."""
        if self.texts.has_conversations(rows[0]):
            return [self._conversations(row, *self.texts.conversations(row)) for row in rows]
        answers = [self.texts.answers(row) for row in rows]
        if self.data.chat_template:
            return [
                self._conversations(row, *([self._user_message(row), _assistant_message(text)] for text in pair))
                for row, pair in zip(rows, answers, strict=True)
            ]
        prompts = [self.texts.prompt(row) for row in rows]
        sides = (self.encoder.pairs(prompts, [pair[side] for pair in answers]) for side in (0, 1))
        return [
            pair if self._both_written(row, *map(_assistant_message, texts)) else None
            for row, texts, pair in zip(rows, answers, zip(*sides, strict=True), strict=True)
        ]

    def _conversations(
        self, row: Row, chosen: list[dict[str, Any]], rejected: list[dict[str, Any]]
    ) -> tuple[Tokens, Tokens] | None:
        if not self._both_written(row, chosen[-1], rejected[-1]):
            return None
        better, worse = (self.encoder.chat(side, [len(side) - 1], row.where) for side in (chosen, rejected))
        return better, worse

    def _both_written(self, row: Row, chosen: dict[str, Any], rejected: dict[str, Any]) -> bool:
        for name, message in (("chosen", chosen), ("rejected", rejected)):
            if not _written(message):
                self._skip(row, f"empty {name} answer")
                return False
        return True

    def _unless_empty(self, rows: list[Row], texts: list[str], part: str, tokens: list[Tokens]) -> list[Tokens | None]:
        kept: list[Tokens | None] = []
        for row, text, each in zip(rows, texts, tokens, strict=True):
            if not text.strip():
                self._skip(row, f"empty {part}")
            kept.append(each if text.strip() else None)
        return kept

    def _user_message(self, row: Row) -> dict[str, Any]:
        return {"role": "user", "content": self.texts.prompt(row)}

    def _as_messages(self, row: Row) -> list[dict[str, Any]]:
        return [self._user_message(row), _assistant_message(self.texts.completion(row))]

    def _chat_prompt(self, row: Row, messages: list[dict[str, Any]]) -> list[int]:
        before = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        if not before:
            raise InputError(f"{row.where} has no message before its assistant turn; give it at least one.")
        return self.encoder.chat_prompt(before, row.where)

    def _encode_messages(self, row: Row, messages: list[dict[str, Any]]) -> Tokens | None:
        if messages[-1]["role"] != "assistant":
            raise InputError(
                f"{row.where} ends with a message of the {messages[-1]['role']}, so there is no completion to learn; "
                f"the last message must be the assistant's."
            )
        turns = [i for i, message in enumerate(messages) if i and message["role"] == "assistant"]
        if not turns:
            raise InputError(f"{row.where} has no message before its assistant turn; give it at least one.")
        wanted = turns if self.source.train_on == "all" else turns[-1:]
        written = [i for i in wanted if _written(messages[i])]
        if not written:
            self._skip(row, "empty completion")
            return None
        return self.encoder.chat(messages, written, row.where)

    def _row(self, row: Row, tokens: Tokens | tuple[Tokens, Tokens]) -> Example | None:
        """The example of a row's tokens, or of both its answers' tokens; None where it was skipped."""
        if isinstance(tokens, Tokens):
            return self._example(row, tokens)
        chosen = self._example(row, tokens[0])
        rejected = None if chosen is None else self._example(row, tokens[1])
        if chosen is None or rejected is None:
            return None
        assert np.array_equal(chosen.prompt_ids, rejected.prompt_ids)  # the table holds it once
        if np.array_equal(chosen.input_ids, rejected.input_ids):
            self._skip(row, "identical answers")
            return None
        return replace(chosen, rejected=rejected)

    def _example(self, row: Row, tokens: Tokens) -> Example | None:
        """The example of a row's tokens, None where it was skipped. The limits on length are applied here."""
        length, limits = len(tokens.input_ids), self.data
        ids = np.asarray(tokens.input_ids[: limits.max_tokens], dtype=np.int32)
        counted = tokens.counted()[: limits.max_tokens]
        if tokens.prompt_tokens > limits.max_prompt_tokens:
            self._too_long(row, f"has a prompt of {tokens.prompt_tokens} tokens", "max_prompt_tokens", "skip")
        elif length > limits.max_tokens and limits.too_long != "truncate":
            self._too_long(row, f"has {length} tokens", "max_tokens", "skip or truncate")
        elif self.prompts_only and not length:
            self._skip(row, "empty prompt")
        elif not self.prompts_only and not counted.any():
            self._skip(row, "no counted token")
        else:
            return Example(ids, counted, None, tokens.prompt_tokens, row.where, row.fields)
        return None

    def _too_long(self, row: Row, what: str, setting: str, ways: str) -> None:
        if self.data.too_long == "error":
            door = "data." if self.texts.section else ""
            raise InputError(
                f"{row.where} {what}, more than {door}{setting} ({getattr(self.data, setting)}); raise it, or set "
                f"{door}too_long to {ways}."
            )
        self._skip(row, f"more than {setting}")

    def _skip(self, row: Row, reason: str) -> None:
        self.skipped[reason] += 1
        self.first_skipped.setdefault(reason, row.where)


def _assistant_message(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _written(message: dict[str, Any]) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls"))


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


def tokenize(
    source: DataSource, data: DataConfig, tokenizer: "PreTrainedTokenizerBase", *, prompts_only: bool = False,
    pairs: bool = False,
) -> ExampleTable:  # fmt: skip
    """Read and tokenise a source. See `RowTokenizer`.

    Raises:
        InputError: the source or a row cannot be read or is too long, or no row is left to learn from.
    """
    rows = RowTokenizer(source, data, tokenizer, prompts_only=prompts_only, pairs=pairs)
    return collect(rows, read_rows(source), source.path)


def collect(tokenizer: RowTokenizer, rows: Iterable[Row], name: str) -> ExampleTable:
    """The examples of the rows as a table; skipped rows are logged, and at least one example must be left."""
    table = ExampleTable.from_examples(tokenizer.examples(rows), tokenizer.skipped)
    reasons = ", ".join(
        f"{reason} ({count}, first {tokenizer.first_skipped[reason]})" for reason, count in tokenizer.skipped.items()
    )
    if not len(table):
        raise InputError(f"'{name}' has no row that can be used: {reasons or 'it is empty'}.")
    if reasons:
        logger.warning("'%s': %d rows skipped: %s", name, sum(tokenizer.skipped.values()), reasons)
    return table


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
