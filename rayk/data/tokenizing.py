"""Tokenize rows into examples, once per run, on the driver."""

import logging
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rayk.config import DataConfig, DataSource
from rayk.data.chat_template import ChatTemplate
from rayk.data.chunks import cut_into_chunks
from rayk.data.examples import Example, ExampleTable
from rayk.data.row_texts import Conversation, Format, RowTexts
from rayk.data.sources import Row, read_rows
from rayk.data.text_encoder import TextEncoder, Tokens
from rayk.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

CHUNK_ROWS = 1000
"""Rows that are tokenized together."""
_RowTokens = Tokens | tuple[Tokens, Tokens]


class RowTokenizer:
    """Tokenize the rows of one source; `skipped` counts the unusable rows by reason, `ends` are the ids of the special
    tokens that end the completions.

    Args:
        source: fields and format.
        data: length limits, and whether prompts are rendered in the chat template.
        tokenizer: a transformers tokenizer with an EOS token.
        prompts_only: make examples of the prompts, without counted tokens, for runs in which a model generates the
            completions. Completions are not read.
        pairs: make preference pairs if the source's format is `auto`.
        section: prefix of the source's settings in error messages.
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
        if source.chunk_tokens is not None:  # texts are cut afterwards
            data = data.model_copy(update={"max_tokens": sys.maxsize})
        self.source, self.data, self.prompts_only, self.pairs = source, data, prompts_only, pairs
        self.texts = RowTexts(source, section)
        template = ChatTemplate.from_settings(data, tokenizer)
        self.encoder = TextEncoder(tokenizer, template, source.count_template_text)
        self.format: Format | None = None
        self.skipped: Counter[str] = Counter()
        self.first_skipped: dict[str, str] = {}
        self.divided_rows = 0
        """Number of rows of which each trained turn is an example of its own."""
        self.ends: set[int] = set()

    def examples(self, rows: Iterable[Row]) -> Iterator[Example]:
        """Yield the usable rows as examples, in order.

        Raises:
            InputError: a row lacks required fields, is malformed, or is too long while `too_long` is `error`.
        """
        remaining = iter(rows)
        while chunk := list(islice(remaining, CHUNK_ROWS)):
            makes_pairs = self._makes_pairs(chunk[0])
            encoded: Iterable[Sequence[_RowTokens]] = self._encode_pairs(chunk) if makes_pairs else self._encode(chunk)
            for row, sequences in zip(chunk, encoded, strict=True):
                for tokens in sequences:
                    if (example := self._make_example(row, tokens)) is not None:
                        yield example

    def prompt_of(self, row: Row) -> np.ndarray:
        """Return the token ids from which a model generates the row's (last) completion, int32 [prompt_tokens].

        Raises:
            InputError: the row is plain text, which has no prompt, or lacks required fields.
        """
        tokens = self._encode_prompts([row])[0][-1]
        return np.asarray(tokens.input_ids, dtype=np.int32)

    def _encode(self, rows: list[Row]) -> list[list[Tokens]]:
        """Return the tokens of each row: none for a skipped row, several if each of its turns is an example."""
        if self.prompts_only:
            return self._encode_prompts(rows)
        form = self._format(rows[0])
        if form == "messages":
            return [self._encode_conversation(row, self.texts.conversation(row)) for row in rows]
        if form == "text":
            texts = [self.texts.text(row) for row in rows]
            tokens = self.encoder.texts(texts)
            return [
                [row_tokens] if self._is_filled(row, text, "text") else []
                for row, text, row_tokens in zip(rows, texts, tokens, strict=True)
            ]
        if self.data.chat_template:
            return [self._encode_conversation(row, self.texts.conversation(row)) for row in rows]
        prompts, completions = [self.texts.prompt(row) for row in rows], [self.texts.completion(row) for row in rows]
        tokens = self.encoder.pairs(prompts, completions)
        return [
            [pair] if self._has_text(row, prompt, completion) else []
            for row, prompt, completion, pair in zip(rows, prompts, completions, tokens, strict=True)
        ]

    def _encode_prompts(self, rows: list[Row]) -> list[list[Tokens]]:
        """Return the tokens of each row's prompts: several if each of its turns is an example."""
        form = self._format(rows[0])
        if form == "text":
            raise InputError(
                f"{rows[0].where} is plain text, which has no prompt to generate from; give rows with prompts, or set "
                f"{self.texts.section}format."
            )
        is_chat = form == "messages" or (form == "preference" and self.texts.has_conversations(rows[0]))
        if is_chat or self.data.chat_template:
            chats = [self.texts.prompts(row, pairs=form == "preference") for row in rows]
            prompts = [
                [self.encoder.chat_prompt(chat, row.where, self.texts.tools(row)) for chat in chats_of_row]
                for row, chats_of_row in zip(rows, chats, strict=True)
            ]
            if not self.ends and (end := self.encoder.end_of_answer(chats[0][-1], rows[0].where)) is not None:
                self.ends.add(end)
        else:
            prompts = [[ids] for ids in self.encoder.prompts([self.texts.prompt(row) for row in rows])]
            self.ends.add(self.encoder.eos_id)
        return [[Tokens(ids, [], (len(ids),)) for ids in prompts_of_row] for prompts_of_row in prompts]

    def _format(self, row: Row) -> Format:
        if self.format is None:
            self.format = self.texts.format_of(row, prompts_only=self.prompts_only, pairs=self.pairs)
        return self.format

    def detect_format(self, first: Row) -> None:
        """Take the format of the source from its first row, if another row is tokenized first."""
        self._format(first)

    def _makes_pairs(self, row: Row) -> bool:
        return self._format(row) == "preference" and not self.prompts_only

    def _encode_pairs(self, rows: list[Row]) -> list[list[tuple[Tokens, Tokens]]]:
        """Return the tokens of each row's chosen and rejected answer after the prompt, none for a skipped row."""
        if self.data.chat_template or self.texts.has_conversations(rows[0]):
            return [self._conversations(row, *self.texts.conversations(row)) for row in rows]
        answers = [self.texts.answers(row) for row in rows]
        prompts = [self.texts.prompt(row) for row in rows]
        sides = (self.encoder.pairs(prompts, [pair[side] for pair in answers]) for side in (0, 1))
        return [
            [pair] if self._has_both_answers(row, *map(_assistant_message, texts)) else []
            for row, texts, pair in zip(rows, answers, zip(*sides, strict=True), strict=True)
        ]

    def _conversations(
        self, row: Row, chosen: list[dict[str, Any]], rejected: list[dict[str, Any]]
    ) -> list[tuple[Tokens, Tokens]]:
        if not self._has_both_answers(row, chosen[-1], rejected[-1]):
            return []
        tools = self.texts.tools(row)
        better, worse = (self.encoder.chat(side, [len(side) - 1], row.where, tools) for side in (chosen, rejected))
        return [(better, worse)]

    def _has_both_answers(self, row: Row, chosen: dict[str, Any], rejected: dict[str, Any]) -> bool:
        for name, message in (("chosen", chosen), ("rejected", rejected)):
            if not _has_content(message):
                self._skip(row, f"empty {name} answer")
                return False
        return True

    def _is_filled(self, row: Row, text: str, part: str) -> bool:
        if not text.strip():
            self._skip(row, f"empty {part}")
        return bool(text.strip())

    def _has_text(self, row: Row, prompt: str, completion: str) -> bool:
        """Skip a row without a completion, or whose completion has no token before it: its first token, at position 0,
        is predicted from nothing."""
        if not prompt and not self.encoder.prefix:
            self._skip(row, "empty prompt, and no BOS token")
            return False
        return self._is_filled(row, completion, "completion")

    def _encode_conversation(self, row: Row, chat: Conversation) -> list[Tokens]:
        messages = chat.messages
        if messages[-1]["role"] != "assistant":
            raise InputError(
                f"{row.where} ends with a message of role {messages[-1]['role']}, so it has no completion to train on; "
                f"the last message must have role assistant."
            )
        if not chat.turns:
            self._skip(row, "no assistant turn with a weight of 1")
            return []
        with_content = [i for i in chat.turns if _has_content(messages[i])]
        if not with_content:
            self._skip(row, "empty completion")
            return []
        sequences = self.encoder.chats(messages, with_content, row.where, self.texts.tools(row))
        self.divided_rows += len(sequences) > 1
        return sequences

    def _make_example(self, row: Row, tokens: _RowTokens) -> Example | None:
        """Return the example of a row, from its tokens or from those of its two answers; None for a skipped row."""
        if isinstance(tokens, Tokens):
            return self._make_sequence(row, tokens)
        chosen = self._make_sequence(row, tokens[0])
        rejected = None if chosen is None else self._make_sequence(row, tokens[1])
        if chosen is None or rejected is None:
            return None
        assert np.array_equal(chosen.prompt_ids, rejected.prompt_ids)  # the table stores it once
        if np.array_equal(chosen.input_ids, rejected.input_ids):
            self._skip(row, "identical answers")
            return None
        return replace(chosen, rejected=rejected)

    def _make_sequence(self, row: Row, tokens: Tokens) -> Example | None:
        """Apply the length limits and return an example without a rejected answer, None for a skipped row."""
        length, limits = len(tokens.input_ids), self.data
        ids = np.asarray(tokens.input_ids[: limits.max_tokens], dtype=np.int32)
        counted = tokens.counted()[: limits.max_tokens]
        prompt = tokens.prompts[0] if tokens.limited_prompt is None else tokens.limited_prompt
        if prompt > limits.max_prompt_tokens:
            self._reject_too_long(row, f"has a prompt of {prompt} tokens", "max_prompt_tokens", "skip")
        elif length > limits.max_tokens and limits.too_long != "truncate":
            self._reject_too_long(row, f"has {length} tokens", "max_tokens", "skip or truncate")
        elif self.prompts_only and not length:
            self._skip(row, "empty prompt")
        elif not self.prompts_only and not counted.any():
            self._skip(row, "no counted token")
        else:
            if length <= limits.max_tokens and counted.any():
                self.ends |= {int(ids[np.flatnonzero(counted)[-1]])} & self.encoder.special_ids
            return Example(ids, counted, None, tokens.prompt_tokens(len(ids)), row.where, row.fields)
        return None

    def _reject_too_long(self, row: Row, problem: str, setting: str, alternatives: str) -> None:
        """Skip a row that is longer than the limit `setting`, or raise InputError if `too_long` is `error`."""
        if self.data.too_long == "error":
            prefix = "data." if self.texts.section else ""
            raise InputError(
                f"{row.where} {problem}, more than {prefix}{setting} ({getattr(self.data, setting)}); raise it, or set "
                f"{prefix}too_long to {alternatives}."
            )
        self._skip(row, f"more than {setting}")

    def _skip(self, row: Row, reason: str) -> None:
        self.skipped[reason] += 1
        self.first_skipped.setdefault(reason, row.where)


def _assistant_message(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _has_content(message: dict[str, Any]) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls"))


def tokenize(
    source: DataSource, data: DataConfig, tokenizer: "PreTrainedTokenizerBase", *, prompts_only: bool = False,
    pairs: bool = False,
) -> ExampleTable:  # fmt: skip
    """Read and tokenize a source; see `RowTokenizer` for the arguments.

    Raises:
        InputError: the source or a row cannot be read or is too long, or no row is usable.
    """
    rows = RowTokenizer(source, data, tokenizer, prompts_only=prompts_only, pairs=pairs)
    return build_table(rows, read_rows(source), source.path)


def build_table(tokenizer: RowTokenizer, rows: Iterable[Row], name: str) -> ExampleTable:
    """Tokenize rows into a table, and log the skipped ones.

    Raises:
        InputError: as `RowTokenizer.examples`, or no row is usable.
    """
    table = ExampleTable.from_examples(tokenizer.examples(rows), tokenizer.skipped, tokenizer.ends)
    report_rows(name, len(table), tokenizer)
    return cut_into_chunks(table, tokenizer.source, tokenizer.texts.section)


class Counts(Protocol):
    """Counts of a source's rows: `skipped` ones by reason, the first one of each, and those made into several."""

    skipped: Any
    first_skipped: dict[str, str]
    divided_rows: int


def report_rows(name: str, usable: int, counts: Counts) -> None:
    """Log the rows of the source `name` that were skipped or divided.

    Raises:
        InputError: no row is usable.
    """
    if counts.divided_rows:
        logger.info(
            "'%s': the chat template prints earlier assistant turns differently from the last one, so each trained "
            "turn of %d rows is an example of its own; train_on: last costs fewer tokens.",
            name, counts.divided_rows,
        )  # fmt: skip
    reasons = ", ".join(
        f"{reason} ({count:,} {'row' if count == 1 else 'rows'}, first {counts.first_skipped[reason]})"
        for reason, count in counts.skipped.items()
    )
    if not usable:
        fix = "change the rows, or the limits in section 'data'" if reasons else "add rows, or change the path"
        raise InputError(f"'{name}' has no usable row: {reasons or 'it is empty'}; {fix}.")
    if reasons:
        logger.warning("'%s': %d rows skipped: %s", name, sum(counts.skipped.values()), reasons)
