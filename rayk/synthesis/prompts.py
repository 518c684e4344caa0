"""Read the prompts that a teacher generates completions for."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rayk.config import AnswerConfig, DataSource
from rayk.data.row_texts import Format, RowTexts
from rayk.data.sources import Row, read_rows
from rayk.engines.base import SamplingParameters
from rayk.errors import InputError
from rayk.synthesis.requests import CompletionRequest
from rayk.text.answers import answers_match, find_answer, find_last_match


@dataclass(frozen=True)
class Prompt:
    """The prompt of a row.

    Attributes:
        text: prompt as the student will read it. Of a conversation with more than a user's message, a transcript, for
            filters, scorers and judges.
        where: location of the row in words, for error messages.
        fields: the row as it was read.
        truth: right answer in the row's notation; None if it is not needed.
        messages: the conversation before the answer, for rows of messages; else empty.
        tools: schemas of the tools that the row's assistant may call; None without any.
    """

    text: str
    where: str
    fields: Mapping[str, Any]
    truth: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: list[dict[str, Any]] | None = None

    @property
    def has_context(self) -> bool:
        """Whether the prompt is more than one user's message, so that only a chat template can express it."""
        return bool(self.tools) or (bool(self.messages) and [message["role"] for message in self.messages] != ["user"])

    @property
    def question(self) -> str:
        """The last message's text; of a prompt without messages, its whole text."""
        return self.messages[-1]["content"] if self.messages else self.text

    def with_question(self, question: str) -> "Prompt":
        """Return the prompt with another last message."""
        if not self.messages:
            return replace(self, text=question)
        messages = (*self.messages[:-1], {**self.messages[-1], "content": question})
        return replace(self, text=transcript(messages), messages=messages)

    def request(self, seed: int, parameters: SamplingParameters) -> CompletionRequest:
        """Return the request for a completion of this prompt."""
        messages = self.messages if self.has_context else ()
        return CompletionRequest(self.text, seed, parameters, messages=messages, tools=self.tools)


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
        messages = _messages(texts, row, form)
        text = transcript(messages) if messages else texts.prompt(row)
        if not (messages[-1]["content"] if messages else text).strip():
            raise InputError(f"{row.where} has an empty prompt; add one, or remove the row.")
        truth = None if answer is None else _truth(row, answer)
        tools = texts.tools(row) if messages else None
        prompts.append(Prompt(text, row.where, row.fields, truth, messages, tools))
    return prompts


def transcript(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return a conversation as text: a single user's message as it is, else the messages with their roles."""
    if [message["role"] for message in messages] == ["user"]:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)


def is_right(found: str | None, truth: str, answer: AnswerConfig) -> bool:
    """Return whether an answer found by `find_answer` equals the one in `truth`."""
    right = find_answer(truth, answer.type, choices=answer.choices)
    return found is not None and right is not None and answers_match(found, right, answer.type)


def fingerprint(prompts: Sequence[Prompt], *, whole: bool = False) -> str:
    """Return a hash of the prompts' texts in order; with `whole` also of the rows' fields and right answers."""
    digest = hashlib.sha256()
    for prompt in prompts:
        parts: list[Any] = [prompt.text, *([prompt.tools] if prompt.tools else [])]
        if whole:
            parts += [prompt.truth, dict(prompt.fields)]
        digest.update(json.dumps(parts, default=str).encode())
    return digest.hexdigest()[:16]


def _messages(texts: RowTexts, row: Row, form: Format | None) -> tuple[dict[str, Any], ...]:
    """Return the messages before a row's answer; empty if its prompt is text."""
    if form != "messages" and not (form == "preference" and texts.has_conversations(row)):
        return ()
    messages = texts.prompt_messages(row, pairs=form == "preference")
    if messages[-1]["role"] not in ("user", "tool"):
        raise InputError(
            f"{row.where}: the conversation before the answer ends with a message of role {messages[-1]['role']}, so "
            "there is nothing to answer; end it with a message of role user."
        )
    return tuple(messages)


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
