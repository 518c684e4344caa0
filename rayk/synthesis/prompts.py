"""The rows a teacher writes for: their prompts as text."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayk.config import AnswerConfig, DataSource
from rayk.data.prompts import RowTexts
from rayk.data.sources import Row, read_rows
from rayk.errors import InputError
from rayk.text.answers import answers_match, find_answer, find_last_match


@dataclass(frozen=True)
class Prompt:
    """A row to write for.

    Attributes:
        text: what the student will read.
        where: the row's place in words, for messages.
        fields: the row as it was read.
        truth: its right answer, as the row writes it; None where it is not needed.
    """

    text: str
    where: str
    fields: Mapping[str, Any]
    truth: str | None = None


def read_prompts(source: DataSource, section: str, answer: AnswerConfig | None = None) -> list[Prompt]:
    """The rows of a source as prompts, with their truth where `answer` says what it looks like.

    Args:
        section: how errors name the source's settings ("data.train.").

    Raises:
        InputError: a row cannot be read, has no prompt, or no truth.
    """
    texts = RowTexts(source, section)
    prompts: list[Prompt] = []
    form = None
    for row in read_rows(source):
        form = form or texts.format_of(row, prompts_only=True)
        if form == "text":
            raise InputError(f"{row.where} is plain text, which has no prompt to write for; set {section}prompt_field.")
        text = _message(texts, row) if form == "messages" else texts.prompt(row)
        if not text.strip():
            raise InputError(f"{row.where} has an empty prompt; give it one, or remove the row.")
        prompts.append(Prompt(text, row.where, row.fields, None if answer is None else _truth(row, answer)))
    return prompts


def is_right(found: str | None, truth: str, answer: AnswerConfig) -> bool:
    """Whether an answer, as `find_answer` finds it, is the one in `truth`."""
    right = find_answer(truth, answer.type, choices=answer.choices)
    return found is not None and right is not None and answers_match(found, right, answer.type)


def fingerprint(prompts: Sequence[Prompt], *, whole: bool = False) -> str:
    """A hash of the prompts' texts in their order; `whole`: of the rows' fields and truths, too."""
    digest = hashlib.sha256()
    for prompt in prompts:
        parts = [prompt.text, prompt.truth, dict(prompt.fields)] if whole else [prompt.text]
        digest.update(json.dumps(parts, default=str).encode())
    return digest.hexdigest()[:16]


def _message(texts: RowTexts, row: Row) -> str:
    """The one message before the assistant's."""
    messages = texts.messages(row)
    before = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if [message["role"] for message in before] != ["user"]:
        raise InputError(
            f"{row.where} has more than one user's message before the last answer (or none); a teacher is asked one "
            "prompt: give rows of a prompt each."
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
        looked_for = f"pattern {answer.pattern!r}" if truth is None else f"type '{answer.type}'"
        raise InputError(
            f"{row.where}: synthesis.answer finds no answer by its {looked_for} in the truth {text[-60:]!r}; set "
            "synthesis.answer.pattern and type."
        )
    return truth
