"""Read the texts of rows: the fields of prompt and completion, templates, messages and tools."""

import math
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rayk.config import DataSource
from rayk.data.messages import SHAREGPT_FIELD, Message, check_unicode, parse_message, parse_messages, parse_tools
from rayk.data.rows import Row, Unreadable
from rayk.errors import InputError

_SHAREGPT_SYSTEM_FIELD = "system"

Format = Literal["prompt_completion", "messages", "text", "preference"]


@dataclass(frozen=True)
class Conversation:
    """A row as a chat.

    Attributes:
        messages: {role, content}, with `tool_calls`, `tool_call_id` or `name` where the row has them.
        prompt_messages: number of leading messages after which the (last) completion is generated.
        turns: indices of the assistant messages to train on: in messages the last one or all (`train_on`), without
            those of `weight` 0; in conversational prompt/completion rows all of the completion.
    """

    messages: list[Message]
    prompt_messages: int
    turns: list[int]


@dataclass(frozen=True)
class RowTexts:
    """Read the texts of rows according to a source's settings.

    Attributes:
        source: fields and templates.
        section: prefix of the settings in error messages ("data.train."); empty for keyword arguments in Python.
    """

    source: DataSource
    section: str = "data.train."
    _found_fields: set[str] = field(default_factory=set, repr=False, compare=False)

    def __post_init__(self) -> None:
        for setting in ("prompt_template", "completion_template"):
            template = getattr(self.source, setting)
            if template is not None:
                _check_template(template, self.section + setting)

    def format_of(self, row: Row, *, prompts_only: bool = False, pairs: bool = False) -> Format:
        """Return the form in which rows are read, by the source's format and the fields of `row`, the first row.

        `messages` stands for all rows that are chats: messages, ShareGPT, and a conversational prompt and completion.
        For format `auto` it is `preference` with `pairs`.

        Raises:
            InputError: the row lacks the fields of every format.
        """
        source, fields = self.source, row.fields
        if source.format == "sharegpt":
            return "messages"
        if source.format == "prompt_completion":
            return "messages" if self._is_conversational(row) else "prompt_completion"
        if source.format != "auto":
            return source.format
        if pairs:
            return "preference"
        prompt, completion = self._has(row, "prompt"), self._has(row, "completion")
        if (prompt and completion) or source.prompt_template or source.completion_template:
            return "messages" if self._is_conversational(row) else "prompt_completion"
        if self._chat_field(row) in fields:
            return "messages"
        if prompt and prompts_only:
            return "messages" if self._is_conversational(row) else "prompt_completion"
        if source.text_field in fields:
            return "text"
        raise InputError(
            f"{row.where} has neither '{source.prompt_field}' with '{source.completion_field}', nor "
            f"'{source.messages_field}', nor '{source.text_field}' (it has: {_names(fields)}); set {self.section}"
            f"prompt_field and {self.section}completion_field, or a prompt_template."
        )

    def prompt(self, row: Row) -> str:
        """Return the prompt of a prompt/completion row."""
        return self._text(row, "prompt")

    def completion(self, row: Row) -> str:
        """Return the completion of a prompt/completion row."""
        return self._text(row, "completion")

    def text(self, row: Row) -> str:
        """Return the text of a text row."""
        return self._text(row, "text")

    def messages(self, row: Row) -> list[Message]:
        """Return the messages of a row, which may be a prompt and a completion; see `conversation`."""
        return self.conversation(row).messages

    def prompt_messages(self, row: Row, *, pairs: bool = False) -> list[Message]:
        """Return the messages after which a completion is generated; the completion need not exist.

        A prompt that is text becomes a user's message. With `pairs`, of a preference row: the messages before both
        answers.

        Raises:
            InputError: there is no such message, or a message is malformed.
        """
        if pairs and self.has_conversations(row):
            return self.conversations(row)[0][:-1]
        if not pairs and self._is_chat(row):
            chat = self.conversation(row)
            return chat.messages[: chat.prompt_messages]
        return self._without_weights(self._with_system(row, self._prompt_messages(row)))

    def prompts(self, row: Row, *, pairs: bool = False) -> list[list[Message]]:
        """Return the messages before each completion that is generated: before each turn of a conversation with
        `train_on: all`, else `prompt_messages` only. Errors as `prompt_messages`."""
        if pairs or self.source.train_on == "last" or not self._is_chat(row):
            return [self.prompt_messages(row, pairs=pairs)]
        chat = self.conversation(row)
        is_open = chat.prompt_messages == len(chat.messages)  # ends with a message that is not answered yet
        ends = [*chat.turns, *([chat.prompt_messages] if is_open or not chat.turns else [])]
        return [chat.messages[:end] for end in ends]

    def conversation(self, row: Row) -> Conversation:
        """Return a row of messages, or of a prompt and a completion that are each messages or text, as a chat.

        Raises:
            InputError: a message is malformed, or no message precedes the completion.
        """
        if self._is_chat(row):
            messages = self._with_system(row, self._messages(row, self._chat_field(row), "messages_field"))
            prompt_messages = len(messages) - (messages[-1]["role"] == "assistant")
            first = 1
        else:
            messages = self._with_system(row, self._prompt_messages(row))
            prompt_messages = first = len(messages)
            messages = messages + self._answer(row, "completion")
        if not prompt_messages:
            raise InputError(f"{row.where} has no message before its assistant turn; add at least one.")
        turns = [
            i
            for i, message in enumerate(messages)
            if i >= first and message["role"] == "assistant" and message.get("weight", 1)
        ]
        if self._is_chat(row) and self.source.train_on == "last":
            turns = turns[-1:]
        return Conversation(self._without_weights(messages), prompt_messages, turns)

    def tools(self, row: Row) -> list[dict[str, Any]] | None:
        """Return the schemas of the tools that a row's assistant may call, as {type, function}; None without tools.

        Raises:
            InputError: the field is neither a list of schemas nor the JSON text of one.
        """
        name = self.source.tools_field
        if name is None or row.fields.get(name) is None:
            return None
        value = self._value(row, name, "tools_field")
        return parse_tools(value, f"{row.where}: field '{name}'", f"{self.section}tools_field")

    def answers(self, row: Row) -> tuple[str, str]:
        """Return the chosen and the rejected answer of a preference row with texts."""
        return self._text(row, "chosen"), self._text(row, "rejected")

    def has_conversations(self, row: Row) -> bool:
        """Return whether the prompt or an answer of a preference row are messages."""
        answers = [
            self._value(row, getattr(self.source, setting), setting) for setting in ("chosen_field", "rejected_field")
        ]
        prompt = None if self.source.prompt_template else row.fields.get(self.source.prompt_field)
        return any(isinstance(value, list | tuple | Mapping) for value in [prompt, *answers])

    def conversations(self, row: Row) -> tuple[list[Message], list[Message]]:
        """Return the chosen and the rejected conversation of a preference row, which differ in their last message only.

        The answers may start with the prompt's messages, or the prompt has its own field, with messages or text. An
        answer may be text or one message too.

        Raises:
            InputError: the messages are malformed or differ earlier.
        """
        source = self.source
        chosen, rejected = (self._answer(row, part) for part in ("chosen", "rejected"))
        if chosen[0]["role"] == "assistant" and rejected[0]["role"] == "assistant":
            prompt = self._prompt_messages(row)
            chosen, rejected = prompt + chosen, prompt + rejected
        for name, messages in ((source.chosen_field, chosen), (source.rejected_field, rejected)):
            if len(messages) < 2 or messages[-1]["role"] != "assistant":
                raise InputError(
                    f"{row.where}: '{name}' must end with a message of role assistant after at least one other; "
                    "correct the row."
                )
        chosen, rejected = (self._without_weights(self._with_system(row, side)) for side in (chosen, rejected))
        if chosen[:-1] != rejected[:-1]:
            raise InputError(
                f"{row.where}: '{source.chosen_field}' and '{source.rejected_field}' differ before their last message; "
                "a pair is two answers to one prompt, so correct the row."
            )
        return chosen, rejected

    def _is_chat(self, row: Row) -> bool:
        """Return whether a row is read from its field of messages, not from a prompt and a completion."""
        if self.source.format != "auto":
            return self.source.format in ("messages", "sharegpt")
        template = self.source.prompt_template or self.source.completion_template
        both = self._has(row, "prompt") and self._has(row, "completion")
        return not (template or both) and self._chat_field(row) in row.fields

    def _is_conversational(self, row: Row) -> bool:
        """Return whether the prompt or the completion of a row are messages."""
        return any(
            getattr(self.source, f"{part}_template") is None
            and isinstance(row.fields.get(getattr(self.source, f"{part}_field")), list | tuple)
            for part in ("prompt", "completion")
        )

    def _has(self, row: Row, part: str) -> bool:
        template = getattr(self.source, f"{part}_template")
        return template is not None or getattr(self.source, f"{part}_field") in row.fields

    def _chat_field(self, row: Row) -> str:
        """Return the field with a row's messages: `messages_field`, or ShareGPT's if the former is left at its default
        and missing."""
        field = self.source.messages_field
        is_default = field == DataSource.model_fields["messages_field"].default
        return SHAREGPT_FIELD if is_default and field not in row.fields and SHAREGPT_FIELD in row.fields else field

    def _prompt_messages(self, row: Row) -> list[Message]:
        """Return the messages of the prompt, with their weights."""
        field = self.source.prompt_field
        if self.source.prompt_template is not None:
            return [{"role": "user", "content": self.prompt(row)}]
        if field not in row.fields and self._chat_field(row) in row.fields:
            field = self._chat_field(row)
        if not isinstance(row.fields.get(field), list | tuple):
            return [{"role": "user", "content": self.prompt(row)}]
        messages = self._messages(row, field, "prompt_field")
        if messages[-1]["role"] == "assistant":
            raise InputError(
                f"{row.where}: '{field}' ends with a message of role assistant, but a prompt ends before the answer; "
                "move that message to the completion."
            )
        return messages

    def _with_system(self, row: Row, messages: list[Message]) -> list[Message]:
        """Return the messages after the row's system prompt, if it has one in a field of its own."""
        field = self.source.system_field
        if field is None and self._chat_field(row) == SHAREGPT_FIELD:
            field = _SHAREGPT_SYSTEM_FIELD
        if field is None or row.fields.get(field) in (None, ""):
            return messages
        system = {"role": "system", "content": self._string(row, field, "system_field")}
        if messages[0]["role"] not in ("system", "developer"):
            return [system, *messages]
        if messages[0]["content"] != system["content"]:
            raise InputError(
                f"{row.where} has one system prompt in field '{field}' and another as its first message; remove one."
            )
        return messages

    def _answer(self, row: Row, part: str) -> list[Message]:
        """Return the messages of a completion, or of a preference pair's answer, that is messages, one message or
        text."""
        field = getattr(self.source, f"{part}_field")
        if getattr(self.source, f"{part}_template", None) is None:
            value = self._value(row, field, f"{part}_field")
            if isinstance(value, Mapping):
                return [parse_message(value, f"{row.where}: '{field}'")]
            if isinstance(value, list | tuple):
                return self._messages(row, field, f"{part}_field")
        return [{"role": "assistant", "content": self._text(row, part)}]

    def _messages(self, row: Row, field: str, setting: str) -> list[Message]:
        return parse_messages(self._value(row, field, setting), row.where, field)

    @staticmethod
    def _without_weights(messages: list[Message]) -> list[Message]:
        return [{key: value for key, value in message.items() if key != "weight"} for message in messages]

    def _text(self, row: Row, part: str) -> str:
        template = getattr(self.source, f"{part}_template", None)
        if template is not None:
            setting = f"{part}_template"
            names = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
            return template.format_map({name: self._string(row, name, setting) for name in names})
        return self._string(row, getattr(self.source, f"{part}_field"), f"{part}_field")

    def _string(self, row: Row, field: str, setting: str) -> str:
        value = self._value(row, field, setting)
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{row.where} has {value} in field '{field}' where text is needed; correct the row.")
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            what = "nothing" if value is None else f"a {type(value).__name__}"
            raise InputError(f"{row.where} has {what} in field '{field}' where text is needed; correct the row.")
        check_unicode(value, f"{row.where}: field '{field}'")
        return value

    def _value(self, row: Row, field: str, setting: str) -> Any:
        if field in row.fields:
            self._found_fields.add(field)
            value = row.fields[field]
            if isinstance(value, Unreadable):
                raise InputError(f"{row.where}: field '{field}' cannot be read: {value}; correct the row.")
            return value
        fix = "set " + self.section + setting
        if field in self._found_fields:
            fix = "other rows have it, so correct or remove this row"
        raise InputError(f"{row.where} has no field '{field}' (it has: {_names(row.fields)}); {fix}.")


def _check_template(template: str, setting: str) -> None:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"{setting} is not a template: {error}; write {{{{ and }}}} for literal braces.") from error
    for _, name, options, conversion in parts:
        if name is not None and (not name or name.isdigit() or set(name) & set(".[]") or options or conversion):
            raise InputError(f"{setting} may contain plain {{field}} names only, not '{{{name}}}'.")


def _names(fields: Mapping[str, Any]) -> str:
    return ", ".join(map(str, fields)) or "no fields"
