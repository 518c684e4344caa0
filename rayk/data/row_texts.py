"""Read the texts of rows: the fields of prompt and completion, templates, and messages."""

import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rayk.config import DataSource
from rayk.data.sources import Row
from rayk.errors import InputError

Format = Literal["prompt_completion", "messages", "text", "preference"]

ROLES = ("system", "developer", "user", "assistant", "tool")


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
        """Return the source's format. For `auto` it is `preference` with `pairs`, else it is derived from the fields of
        `row`, the first row.

        Raises:
            InputError: the row lacks the fields of every format.
        """
        source, fields = self.source, row.fields
        if source.format != "auto":
            return source.format
        if pairs:
            return "preference"
        prompt = source.prompt_template is not None or source.prompt_field in fields
        completion = source.completion_template is not None or source.completion_field in fields
        if (prompt and completion) or source.prompt_template or source.completion_template:
            return "prompt_completion"
        if source.messages_field in fields:
            return "messages"
        if prompt and prompts_only:
            return "prompt_completion"
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

    def messages(self, row: Row) -> list[dict[str, Any]]:
        """Return the messages of a row without null entries.

        Raises:
            InputError: they are not a list of messages with a known role and a content.
        """
        return self._messages(row, self.source.messages_field, "messages_field")

    def _messages(self, row: Row, field: str, setting: str) -> list[dict[str, Any]]:
        messages = self._value(row, field, setting)
        if not isinstance(messages, list) or not messages:
            raise InputError(f"{row.where}: '{field}' must be a list of at least one message with role and content.")
        return [_message(message, f"{row.where}: message {i}") for i, message in enumerate(messages, start=1)]

    def answers(self, row: Row) -> tuple[str, str]:
        """Return the chosen and the rejected answer of a preference row with texts."""
        return self._text(row, "chosen"), self._text(row, "rejected")

    def has_conversations(self, row: Row) -> bool:
        """Return whether the answers of a preference row are lists of messages."""
        return isinstance(self._value(row, self.source.chosen_field, "chosen_field"), list)

    def conversations(self, row: Row) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the chosen and the rejected conversation of a preference row, which differ in their last message only.

        The answers may start with the prompt's messages, or the prompt has its own field, with messages or text.

        Raises:
            InputError: the messages are malformed or differ earlier.
        """
        source = self.source
        chosen, rejected = (
            self._messages(row, getattr(source, setting), setting) for setting in ("chosen_field", "rejected_field")
        )
        if chosen[0]["role"] == "assistant" and rejected[0]["role"] == "assistant":
            prompt = self._prompt_messages(row)
            chosen, rejected = prompt + chosen, prompt + rejected
        for name, messages in ((source.chosen_field, chosen), (source.rejected_field, rejected)):
            if len(messages) < 2 or messages[-1]["role"] != "assistant":
                raise InputError(
                    f"{row.where}: '{name}' must end with a message of role assistant after at least one other; "
                    "correct the row."
                )
        if chosen[:-1] != rejected[:-1]:
            raise InputError(
                f"{row.where}: '{source.chosen_field}' and '{source.rejected_field}' differ before their last message; "
                "a pair is two answers to one prompt, so correct the row."
            )
        return chosen, rejected

    def _prompt_messages(self, row: Row) -> list[dict[str, Any]]:
        field = self.source.prompt_field
        if self.source.prompt_template is None and isinstance(row.fields.get(field), list):
            return self._messages(row, field, "prompt_field")
        return [{"role": "user", "content": self.prompt(row)}]

    def _text(self, row: Row, part: str) -> str:
        template = getattr(self.source, f"{part}_template", None)
        if template is not None:
            setting = f"{part}_template"
            names = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
            return template.format_map({name: self._string(row, name, setting) for name in names})
        return self._string(row, getattr(self.source, f"{part}_field"), f"{part}_field")

    def _string(self, row: Row, field: str, setting: str) -> str:
        value = self._value(row, field, setting)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            what = "nothing" if value is None else f"a {type(value).__name__}"
            raise InputError(f"{row.where} has {what} in field '{field}' where text is needed; correct the row.")
        _check_unicode(value, f"{row.where}: field '{field}'")
        return value

    def _value(self, row: Row, field: str, setting: str) -> Any:
        if field in row.fields:
            self._found_fields.add(field)
            return row.fields[field]
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


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f"{where} is a {type(message).__name__}, not an object with role and content.")
    given = {key: value for key, value in message.items() if value is not None}
    if given.get("role") not in ROLES:
        has = f"the role {given['role']!r}" if "role" in given else f"no role (it has: {_names(given)})"
        raise InputError(f"{where} has {has}; the roles are {', '.join(ROLES)}.")
    if "content" not in given and given["role"] == "assistant" and given.get("tool_calls"):
        return given | {"content": ""}
    if not isinstance(given.get("content"), str):
        raise InputError(f"{where} has no content that is text; give its content as a string.")
    _check_unicode(given["content"], where)
    return given


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{where} contains half a Unicode character (a lone surrogate); correct the row.") from error


def _names(fields: Mapping[str, Any]) -> str:
    return ", ".join(map(str, fields)) or "no fields"
