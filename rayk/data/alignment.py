"""Rows in the tokens of a teacher with another tokenizer (`method.alignment`).

The teacher reads the row's prompt as its own tokenizer and chat template render it, followed by exactly the text of the
student's completion, tokenized by its own tokenizer. An end token of the student's becomes the teacher's end token.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rayk.config import DataConfig
from rayk.data.examples import Example
from rayk.data.sources import Row
from rayk.data.token_bytes import TokenBytes, shared_vocabulary
from rayk.data.tokenizing import RowTokenizer
from rayk.errors import InputError
from rayk.signals.alignment import AlignedView, TokenGroups, VocabularyMap, group_by_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


class UnalignableRow(InputError):
    """A row whose text the teacher's tokenizer cannot represent, or that is too long for the teacher."""


@dataclass(frozen=True)
class _Text:
    """The counted text of a row: its bytes, the student's tokens of it, and whether an end token follows."""

    content: str
    lengths: list[int]
    has_end: bool


class RowAligner:
    """Align rows with the tokens of one teacher.

    Args:
        teacher: the teacher's name.
        data: the settings by which the student's rows are read; the teacher's prompts are read from the same fields.
        max_tokens: length of the teacher's context.

    Raises:
        InputError: the bytes of the tokens of one of the tokenizers are not known, or one has no end-of-sequence token.
    """

    def __init__(
        self, teacher: str, data: DataConfig, student_tokenizer: "PreTrainedTokenizerBase",
        teacher_tokenizer: "PreTrainedTokenizerBase", max_tokens: int,
    ) -> None:  # fmt: skip
        assert data.train is not None
        self.teacher, self.max_tokens = teacher, max_tokens
        self._student = RowTokenizer(data.train, data, student_tokenizer, prompts_only=True)
        own = bool(data.chat_template) and bool(teacher_tokenizer.chat_template)
        teacher_data = data.model_copy(update={"chat_template": True} if own else {})
        self._teacher = RowTokenizer(data.train, teacher_data, teacher_tokenizer, prompts_only=True)
        self._student_bytes = TokenBytes(student_tokenizer, "the student's tokenizer")
        self._teacher_bytes = TokenBytes(teacher_tokenizer, f"teacher '{teacher}'")
        self._vocabularies: dict[bool, VocabularyMap] = {}
        self._end_ids: dict[bool, tuple[int, int]] = {}

    def align(self, row: Example) -> AlignedView:
        """Return `row` in the teacher's tokens.

        Bytes after which the text is no valid UTF-8 (a rollout that stops inside a character) are left out.

        Raises:
            UnalignableRow: the row cannot be aligned; the message names it.
        """
        self._check_completion(row)
        prompt = self._prompt(row)
        is_chat = bool(row.prompt_tokens) and (
            bool(self._teacher.data.chat_template) or self._teacher.format == "messages"
        )
        # A chat template may begin an answer with text that is not counted, such as an empty thought.
        first = next(iter(np.flatnonzero(row.counted)), len(row))
        start = int(first) if row.prompt_tokens else len(self._student.encoder.prefix)
        text = self._text(row, start)
        teacher_ids, lengths = self._tokenize(text.content, row)
        groups = group_by_bytes(text.lengths, lengths)
        # The bytes of a cut completion may end inside a word, which the teacher would not write like this.
        is_single = (groups[:, 1] - groups[:, 0] == 1) & (groups[:, 3] - groups[:, 2] == 1)
        if len(groups) and not text.has_end and not is_single[-1]:
            groups, is_single = groups[:-1], is_single[:-1]
        if len(groups) and sum(lengths) < sum(map(len, self._teacher_bytes.of(teacher_ids))):
            is_single[0] = False  # the teacher's first token has a space that the text has not
        if text.has_end:
            ends = [len(text.lengths), len(text.lengths) + 1, len(teacher_ids), len(teacher_ids) + 1]
            groups, is_single = np.vstack([groups, [ends]]), np.append(is_single, True)
            teacher_ids = [*teacher_ids, self._ends(is_chat)[1]]
        if (length := len(prompt) + len(teacher_ids)) > self.max_tokens:
            raise UnalignableRow(
                f"{row.where or 'A row'} has {length} tokens in the tokenizer of teacher '{self.teacher}', which takes "
                f"{self.max_tokens}; lower data.max_tokens or rollouts.max_new_tokens."
            )
        return _view(row, prompt, teacher_ids, groups, is_single, start, self._vocabulary(is_chat))

    @property
    def student_tokens(self) -> int:
        """Size of the student's vocabulary."""
        return len(self._student_bytes.pieces)

    @property
    def shared_tokens(self) -> int:
        """Number of tokens that both vocabularies contain."""
        return len(self._vocabulary(is_chat=False).student)

    def prompt_tokens(self, row: Example) -> int:
        """Return the number of tokens of the row's prompt as the teacher reads it."""
        return len(self._prompt(row))

    def _check_completion(self, row: Example) -> None:
        """Check that the row is one prompt with one counted completion, or plain text."""
        counted = np.flatnonzero(row.counted)
        is_single = not len(counted) or (counted[0] >= row.prompt_tokens and np.diff(counted).max(initial=1) == 1)
        if is_single and row.prompt_tokens:
            is_single = np.array_equal(row.prompt_ids, self._student.prompt_of(Row(row.fields, row.where)))
        if not is_single:
            raise UnalignableRow(
                f"{row.where or 'A row'} has several turns after its prompt, but method.alignment aligns one "
                "completion per row; leave the row out, or set training.unusable_rows to skip."
            )

    def _prompt(self, row: Example) -> np.ndarray:
        if not row.prompt_tokens:
            return np.asarray(self._teacher.encoder.prefix, dtype=np.int32)
        try:
            return self._teacher.prompt_of(Row(row.fields, row.where))
        except InputError as error:
            raise InputError(f"Teacher '{self.teacher}': {error}") from error

    def _vocabulary(self, is_chat: bool) -> VocabularyMap:
        if is_chat not in self._vocabularies:
            ends = self._ends(is_chat)
            self._vocabularies[is_chat] = shared_vocabulary(self._student_bytes, self._teacher_bytes, ends)
        return self._vocabularies[is_chat]

    def _ends(self, is_chat: bool) -> tuple[int, int]:
        """Return the tokens that end a completion of student and teacher: EOS, or the end of a turn in a chat."""
        if is_chat not in self._end_ids:
            first, second = (
                rows.encoder.chat(_PROBE, [1], "A conversation").input_ids[-1] if is_chat else rows.encoder.eos_id
                for rows in (self._student, self._teacher)
            )
            self._end_ids[is_chat] = first, second
        return self._end_ids[is_chat]

    def _text(self, row: Example, start: int) -> _Text:
        ids = row.input_ids[start:].tolist()
        has_end = bool(ids) and ids[-1] in self._student_bytes.special_ids
        pieces = self._student_bytes.of(ids[:-1] if has_end else ids)
        content = b"".join(pieces)
        try:
            return _Text(content.decode(), [len(piece) for piece in pieces], has_end)
        except UnicodeDecodeError as error:
            return _Text(content[: error.start].decode(), [len(piece) for piece in pieces], False)

    def _tokenize(self, text: str, row: Example) -> tuple[list[int], list[int]]:
        """Return the teacher's tokens of `text` and the number of bytes of `text` that each covers."""
        if not text:
            return [], []
        expected = text.encode()
        ids, pieces = self._encode(text)
        if b"".join(pieces) == b" " + expected:  # SentencePiece puts a space before a text
            if text.startswith(" "):
                ids, pieces = self._encode(text[1:])
            else:
                return ids, [len(pieces[0]) - 1, *map(len, pieces[1:])]
        if (covered := b"".join(pieces)) != expected:
            raise UnalignableRow(
                f"{row.where or 'A row'} cannot be aligned: the tokenizer of teacher '{self.teacher}' changes its text "
                f"({_first_difference(expected, covered)}); leave the row out, or set training.unusable_rows to skip."
            )
        return ids, [len(piece) for piece in pieces]

    def _encode(self, text: str) -> tuple[list[int], list[bytes]]:
        ids = self._teacher.encoder.continuation(text)
        return ids, self._teacher_bytes.of(ids)


def _view(
    row: Example, prompt: np.ndarray, teacher_ids: list[int], groups: np.ndarray, is_single: np.ndarray, start: int,
    vocabulary: VocabularyMap,
) -> AlignedView:  # fmt: skip
    """Return the view of the groups whose student tokens are all counted.

    Args:
        groups: int64 [groups, 4], tokens of the text, which begins at token `start` of the row.
    """
    input_ids = np.concatenate([prompt, np.asarray(teacher_ids, np.int32)]).astype(np.int32)
    counted_before = np.concatenate([[0], np.cumsum(row.counted)])
    first, end = groups[:, 0] + start, groups[:, 1] + start
    kept = counted_before[end] - counted_before[first] == end - first
    kept &= groups[:, 2] + len(prompt) > 0  # nothing predicts a sequence's first token
    groups = groups[kept]
    counted = np.zeros(len(input_ids), dtype=np.bool_)
    for first_token, after_last in groups[:, 2:] + len(prompt):
        counted[first_token:after_last] = True
    teacher_before = np.concatenate([[0], np.cumsum(counted)])
    view = Example(input_ids, counted, None, len(prompt), row.where, row.fields)
    aligned = TokenGroups(
        counted_before[groups[:, :2] + start], teacher_before[groups[:, 2:] + len(prompt)], is_single[kept]
    )
    return AlignedView(view, aligned, vocabulary)


def _first_difference(expected: bytes, found: bytes) -> str:
    at = next((i for i, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]), len(found))
    return f"{expected[at : at + 8].decode(errors='replace')!r} becomes {found[at : at + 8].decode(errors='replace')!r}"
