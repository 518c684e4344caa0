"""A chat template: messages to text."""

import datetime
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayk.config import DataConfig
from rayk.config.data import SHIPPED_TEMPLATES
from rayk.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Tools = list[dict[str, Any]] | None

MARK = "Xqzwoven"
"""Text that stands for a message's content in probes: letters only, because templates may strip or escape others."""

_CALL = {"type": "function", "id": "call00001", "function": {"name": MARK, "arguments": {"a": MARK}}}


class ChatTemplate:
    """Render messages in a chat template.

    Args:
        tokenizer: gives the template and the special tokens that it prints.
        template: the text of a template, instead of the tokenizer's own.
        kwargs: variables of the template, such as `enable_thinking`.
        date: the date that a template prints which asks for today's; None: today.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template: str | None = None,
        kwargs: Mapping[str, Any] | None = None,
        date: datetime.date | None = None,
    ) -> None:
        self.tokenizer, self.template, self.kwargs, self.date = tokenizer, template, dict(kwargs or {}), date
        self._rendered_roles: dict[str, bool] = {}

    @classmethod
    def from_settings(cls, data: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> "ChatTemplate":
        """Return the template in which a run's rows are rendered.

        Raises:
            InputError: the file of the template cannot be read.
        """
        template = read_template(data.chat_template, tokenizer) if isinstance(data.chat_template, str) else None
        return cls(tokenizer, template, data.chat_template_kwargs, data.chat_template_date)

    @property
    def exists(self) -> bool:
        """Whether there is a template: the given one, or the tokenizer's."""
        return bool(self.template or self.tokenizer.chat_template)

    @functools.cached_property
    def variables(self) -> frozenset[str]:
        """The names that the template reads."""
        from jinja2 import meta
        from transformers.utils.chat_template_utils import _compile_jinja_template

        text = self._text(None)
        return frozenset(meta.find_undeclared_variables(_compile_jinja_template(text).environment.parse(text)))

    @functools.cached_property
    def marks_generation(self) -> bool:
        """Whether the template marks what the model writes with `{% generation %}`."""
        return self.exists and "endgeneration" in self._text(None)

    def render(
        self,
        messages: list[Message],
        where: str,
        *,
        tools: Tools = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """Render messages, with the schemas of the tools that the model may call.

        Raises:
            InputError: there is no template, or it fails on these messages.
        """
        return self._render(messages, where, tools, add_generation_prompt)[0]

    def generated_spans(self, messages: list[Message], where: str, tools: Tools = None) -> list[tuple[int, int]]:
        """Return start and end, in characters, of the parts that the template marks with `{% generation %}`."""
        return self._render(messages, where, tools, False)[1]

    def check_rendered(self, messages: list[Message], where: str, tools: Tools) -> None:
        """Check that the template renders the tools, and the kinds of messages of a row.

        Raises:
            InputError: it leaves out tools, calls of tools, or the messages of a role.
        """
        if tools and not self._renders_tools(messages, tools, where):
            raise InputError(
                f"{where}: the chat template does not print the row's tools, so the model would never see them; set "
                "data.chat_template to a template with tools, or remove the rows' tools."
            )
        if any(message.get("tool_calls") for message in messages) and self._call_form is None:
            raise InputError(
                f"{where}: the chat template does not print calls of tools, so they would be left out; set "
                "data.chat_template to a template that prints tool_calls, or write the calls into the content."
            )
        for role in {message["role"] for message in messages} - {"user", "assistant"}:
            if not self._renders_role(role):
                raise InputError(
                    f"{where}: the chat template leaves out messages of role {role}; set data.chat_template to a "
                    "template that prints them, or remove them."
                )

    def _renders_tools(self, messages: list[Message], tools: Tools, where: str) -> bool:
        printed = self.render(messages, where, tools=tools)
        try:
            return printed != self.render(messages, where)
        except InputError:  # the template requires tools
            return True

    def _render(
        self, messages: list[Message], where: str, tools: Tools, add_generation_prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        if not self.exists:
            raise InputError(
                f"{where} requires a chat template, but the tokenizer has none; set data.chat_template to a .jinja "
                f"file or to one of: {', '.join(SHIPPED_TEMPLATES)}; or use prompt and completion fields without "
                "data.chat_template."
            )
        if any(message.get("tool_calls") for message in messages) and self._call_form is not None:
            messages = [_with_call_form(message, self._call_form) for message in messages]
        return self._apply(messages, where, tools, add_generation_prompt)

    def _apply(
        self, messages: list[Message], where: str, tools: Tools, add_generation_prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        variables = {**self.tokenizer.special_tokens_map, **self.kwargs}
        if self.date is not None:
            variables["strftime_now"] = self.date.strftime  # a variable of the call shadows the function of that name
        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self._text(tools),
                return_assistant_tokens_mask=self.marks_generation,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise InputError(f"{where}: the chat template fails on these messages: {error}") from error
        return str(texts[0]), spans[0] if spans else []

    def _text(self, tools: Tools) -> str:
        return str(self.tokenizer.get_chat_template(self.template, tools))

    @functools.cached_property
    def _call_form(self) -> tuple[Any, bool] | None:
        """The content of a message that only calls tools ("" or None), and whether a call's arguments are JSON text;
        None if the template prints no calls."""
        for content, as_text in (("", False), (None, False), ("", True), (None, True)):
            call = _with_call_form({"role": "assistant", "content": "", "tool_calls": [_CALL]}, (content, as_text))
            try:
                text = self._apply([{"role": "user", "content": "?"}, call], "", None, False)[0]
            except InputError:
                continue
            if text.count(MARK) >= 2:
                return content, as_text
        return None

    def _renders_role(self, role: str) -> bool:
        if role not in self._rendered_roles:
            user: Message = {"role": "user", "content": "?"}
            message: Message = {"role": role, "content": MARK}
            messages = [message, user]
            if role == "tool":
                calls = [_CALL | {"function": {"name": "f", "arguments": {}}}]
                call: Message = {"role": "assistant", "content": "", "tool_calls": calls}
                messages = [user, call, message | {"name": "f", "tool_call_id": _CALL["id"]}]
            try:
                text = self._render(messages, "", None, False)[0]
            except InputError:  # the rendering of the row explains it
                text = MARK
            self._rendered_roles[role] = MARK in text
        return self._rendered_roles[role]


def _with_call_form(message: Message, form: tuple[Any, bool]) -> Message:
    """Return a message with its calls in the form that the template prints; see `ChatTemplate._call_form`."""
    if not message.get("tool_calls"):
        return message
    content, as_text = form
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function")
        if isinstance(function, dict) and as_text and not isinstance(function.get("arguments"), str):
            arguments = json.dumps(function.get("arguments") or {}, ensure_ascii=False)
            call = call | {"function": function | {"arguments": arguments}}
        calls.append({"type": "function"} | call)
    return message | {"content": message.get("content") or content, "tool_calls": calls}


def read_template(name: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the text of a shipped template, which prints BOS if the tokenizer puts it before texts, or of a file.

    Raises:
        InputError: there is no such template, or it cannot be read.
    """
    is_shipped = name in SHIPPED_TEMPLATES
    path = Path(__file__).parent / "templates" / f"{name}.jinja" if is_shipped else Path(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"data.chat_template '{name}' is neither a file with a template nor one of: "
            f"{', '.join(SHIPPED_TEMPLATES)}; give the path of a .jinja file or one of these names."
        ) from error
    adds_bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return "{{- bos_token }}" + text if is_shipped and adds_bos else text
