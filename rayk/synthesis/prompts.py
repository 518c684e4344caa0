"""Read the prompts that a teacher generates completions for."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayk.config import AnswerConfig, DataSource
from rayk.data.row_texts import RowTexts
from rayk.data.sources import Row, read_rows
from rayk.errors import InputError
from rayk.text.answers import answers_match, find_answer, find_last_match


@dataclass(frozen=True)
class Prompt:
    """The prompt of a row.

    Attributes:
        text: prompt as the student will read it.
        where: location of the row in words, for error messages.
        fields: the row as it was read.
        truth: right answer in the row's notation; None if it is not needed.
    """

    text: str
    where: str
    fields: Mapping[str, Any]
    truth: str | None = None


def read_prompts(source: DataSource, section: str, answer: AnswerConfig | None = None) -> list[Prompt]:
    """Read the rows of a source as prompts, with their right answers if `answer` is given.

    Args:
        section: prefix of the source's settings in error messages ("data.train.").
        answer: type of the right answer, and the field that contains it.

    Raises:
        InputError: a row cannot be read, or has no prompt or no right answer.
    """
    texts = RowTexts(source, section)
    prompts: list[Prompt] = []
    form = None
    for row in read_rows(source):
        form = form or texts.format_of(row, prompts_only=True)
        if form == "text":
            raise InputError(f"{row.where} is plain text, which has no prompt; set {section}prompt_field.")
        text = _message(texts, row) if form == "messages" else texts.prompt(row)
        if not text.strip():
            raise InputError(f"{row.where} has an empty prompt; add one, or remove the row.")
        prompts.append(Prompt(text, row.where, row.fields, None if answer is None else _truth(row, answer)))
    return prompts


def is_right(found: str | None, truth: str, answer: AnswerConfig) -> bool:
    """Return whether an answer found by `find_answer` equals the one in `truth`."""
    right = find_answer(truth, answer.type, choices=answer.choices)
    return found is not None and right is not None and answers_match(found, right, answer.type)


def fingerprint(prompts: Sequence[Prompt], *, whole: bool = False) -> str:
    """Return a hash of the prompts' texts in order; with `whole` also of the rows' fields and right answers."""
    digest = hashlib.sha256()
    for prompt in prompts:
        parts = [prompt.text, prompt.truth, dict(prompt.fields)] if whole else [prompt.text]
        digest.update(json.dumps(parts, default=str).encode())
    return digest.hexdigest()[:16]


def _message(texts: RowTexts, row: Row) -> str:
    """Return the text of the only message before the assistant's."""
    messages = texts.messages(row)
    before = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if [message["role"] for message in before] != ["user"]:
        raise InputError(
            f"{row.where} must have exactly one message before the last answer, a user's; split conversations into "
            "rows with one prompt each."
        )
    return before[0]["content"]


def _truth(row: Row, answer: AnswerConfig) -> str:
    if row.fields.get(answer.field) is None:
        raise InputError(
            f"{row.where} has no field '{answer.field}' with the right answer; set synthesis.answer.field."
        )
    value = row.fields[answer.field]
    yes_or_no = answer.type == "yes_no" and isinstance(value, bool)
    text = ("no", "yes")[value] if yes_or_no else str(value)
    truth = find_last_match(text, answer.pattern)
    if truth is None or find_answer(truth, answer.type, choices=answer.choices) is None:
        rule = f"pattern {answer.pattern!r}" if truth is None else f"type '{answer.type}'"
        raise InputError(
            f"{row.where}: synthesis.answer finds no answer with its {rule} in the right answer {text[-60:]!r}; set "
            "synthesis.answer.pattern and type."
        )
    return truth
