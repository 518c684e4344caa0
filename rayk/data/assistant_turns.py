"""Find what the model writes in an assistant turn of a chat template, and after which prompt.

At inference a model reads the messages before the turn and the template's generation prompt, and writes the rest. What
is trained must continue exactly that prompt, so each turn is rendered as the last one of its conversation:

    Qwen3     …<|im_start|>assistant⏎ | <think>⏎⏎</think>⏎⏎ | 24 clips<|im_end|>
              generation prompt         template text         answer
"""

import functools
import logging
import re
from dataclasses import dataclass

from rayk.data.chat_template import MARK, ChatTemplate, Message, Tools
from rayk.errors import InputError

logger = logging.getLogger(__name__)

_OPEN_THOUGHT = re.compile(r"<([\w:]*(?:think|thought|reason)\w*)>(\s*)\Z")
_THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")
_SWITCHES = ("enable_thinking", "thinking")


@dataclass(frozen=True)
class Turn:
    """An assistant turn as the model writes it.

    Attributes:
        prompt: the text that the model reads, through the generation prompt.
        parts: the texts after it, each with whether it is counted.
        ends_with_eos: the template ends turns with no special token of the tokenizer, so EOS ends the answer.
    """

    prompt: str
    parts: tuple[tuple[str, bool], ...]
    ends_with_eos: bool

    @property
    def text(self) -> str:
        """The prompt and all parts."""
        return self.prompt + "".join(text for text, _ in self.parts)


class TurnReader:
    """Read the assistant turns of conversations.

    Args:
        template: the chat template.
        special_tokens: the texts of the tokenizer's special tokens.
        eos_token: the text of the EOS token.
        counts_template_text: also count what the template prints between the generation prompt and the row's own text.
    """

    def __init__(
        self, template: ChatTemplate, special_tokens: frozenset[str], eos_token: str, counts_template_text: bool = False
    ) -> None:
        self.template, self.eos_token, self.counts_template_text = template, eos_token, counts_template_text
        self._has_warned = False
        ordered = sorted(special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")

    @functools.cached_property
    def ending(self) -> str | None:
        """The text that the template prints after the content of a last assistant turn; None if it is not constant."""
        user, mark = {"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}
        try:
            before, found, after = self.template.render([user, mark], "").rpartition(MARK)
        except InputError:
            return None
        return after if found and before else None

    def without_end_marks(self, messages: list[Message]) -> list[Message]:
        """Return the messages without end marks at the end of answers, which the template prints itself."""
        end = self._special.search(self.ending or "")
        marks = {self.eos_token} | ({end.group()} if end else set())
        return [
            message | {"content": _strip_marks(message["content"], marks)}
            if message["role"] == "assistant" and isinstance(message.get("content"), str)
            else message
            for message in messages
        ]

    def read(self, messages: list[Message], index: int, where: str, tools: Tools = None) -> Turn:
        """Return the assistant turn at `index`, after the messages before it.

        Raises:
            InputError: the template fails on these messages, leaves out the answer or its thought, or prints an answer
                that cannot follow its generation prompt.
        """
        message, through = messages[index], messages[: index + 1]
        prompt = self.template.render(messages[:index], where, tools=tools, add_generation_prompt=True)
        whole = self.template.render(through, where, tools=tools)
        if not whole.startswith(prompt):
            text, with_eos = self._end(self._after_open_thought(prompt, message, where) + (self.ending or ""))
            return Turn(prompt, ((text, True),), with_eos)
        rest = whole[len(prompt) :]
        _check_complete(rest, message, where)
        text, with_eos = self._end(rest)
        if self.template.marks_generation:
            return Turn(prompt, self._marked_parts(through, where, tools, len(prompt), text), with_eos)
        header = (
            "" if self.counts_template_text else self._template_text(rest, messages[:index], message, prompt, tools)
        )
        if not text[len(header) :].strip():
            raise InputError(
                f"{where}: the chat template prints nothing for the assistant's message {index + 1}; set "
                "data.chat_template to a template that prints it, or remove the row."
            )
        return Turn(prompt, ((header, False), (text[len(header) :], True)) if header else ((text, True),), with_eos)

    def _end(self, text: str) -> tuple[str, bool]:
        """Cut a rendered answer behind its end mark, and return whether it has none."""
        ending = self.ending
        if ending and text.endswith(ending):
            if mark := self._special.search(ending):
                return text[: len(text) - len(ending) + mark.end()], False
            # An end mark that is several ordinary tokens to this tokenizer is replaced by EOS.
            return (text.removesuffix(ending) if ending.strip() else text), True
        marks = list(self._special.finditer(text))
        if marks and not text[marks[-1].end() :].strip():
            return text[: marks[-1].end()], False
        return text, True

    def _template_text(self, rest: str, before: list[Message], message: Message, prompt: str, tools: Tools) -> str:
        """Return the beginning of `rest` that the template prints before any plain answer; "" if the row has it."""
        content = str(message.get("content") or "").strip()
        if (content and rest.lstrip().startswith(content)) or any(message.get(name) for name in _THOUGHT_FIELDS):
            return ""
        try:
            plain = self.template.render([*before, {"role": "assistant", "content": MARK}], "", tools=tools)
        except InputError:
            return ""
        header = plain.removeprefix(prompt).partition(MARK)[0] if plain.startswith(prompt) else ""
        return (
            header if rest.startswith(header) and not (content and content.startswith(header.strip() or MARK)) else ""
        )

    def _marked_parts(
        self, messages: list[Message], where: str, tools: Tools, start: int, text: str
    ) -> tuple[tuple[str, bool], ...]:
        """Divide the text after the prompt by the template's `{% generation %}` marks."""
        parts: list[tuple[str, bool]] = []
        done = 0
        for first, end in self.template.generated_spans(messages, where, tools):
            first, end = max(first - start, done), min(end - start, len(text))
            if first < end:
                parts += [(text[done:first], False)] if done < first else []
                parts.append((text[first:end], True))
                done = end
        if not done:
            raise InputError(f"{where}: the chat template marks no text of this turn with {{% generation %}}; mark it.")
        return tuple(parts)

    def _after_open_thought(self, prompt: str, message: Message, where: str) -> str:
        """Return the answer after a generation prompt that the template does not print before it in a conversation:
        one that opens a thought, as DeepSeek-R1's.

        Raises:
            InputError: the answer cannot follow the generation prompt.
        """
        content, opened = str(message.get("content") or ""), _OPEN_THOUGHT.search(prompt)
        thought = next((str(message[name]) for name in _THOUGHT_FIELDS if message.get(name)), None)
        switch = next((name for name in _SWITCHES if name in self.template.variables), None)
        off = f"set data.chat_template_kwargs to {{{switch}: false}}" if switch else "set data.chat_template to another"
        if opened is None or message.get("tool_calls"):
            on = (
                f"set data.chat_template_kwargs to {{{switch}: true}}"
                if switch
                else "set data.chat_template to another"
            )
            raise InputError(
                f"{where}: the chat template's generation prompt ends with {prompt[-30:]!r}, which the answer cannot "
                f"follow as the template prints it; {on if '</' in prompt[-30:] else off}, or change the row."
            )
        name, space = opened.groups()
        if thought is not None:
            return f"{thought}\n</{name}>\n\n{content}"
        if content.lstrip().startswith(f"<{name}>"):
            inside = content.lstrip().removeprefix(f"<{name}>")
            return inside.removeprefix(space)
        if f"</{name}>" not in content and switch:
            raise InputError(
                f"{where}: the chat template's generation prompt opens a thought (<{name}>), but the answer has none; "
                f"{off}, or give rows with thoughts."
            )
        if f"</{name}>" not in content and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s: the chat template's generation prompt opens a thought (<%s>), but the answer has none and is "
                "trained on right after it; give rows with thoughts, or set data.chat_template to another template.",
                where, name,
            )  # fmt: skip
        return content


def _strip_marks(text: str, marks: set[str]) -> str:
    """Return `text` without the marks at its end, each with the space around it."""
    while mark := next((mark for mark in marks if text.rstrip().endswith(mark)), None):
        text = text.rstrip().removesuffix(mark)
    return text


def _check_complete(rest: str, message: Message, where: str) -> None:
    """Check that a rendered turn contains the thought of its message."""
    content = str(message.get("content") or "")
    thoughts = [str(message[name]) for name in _THOUGHT_FIELDS if message.get(name)]
    if "</think>" in content:
        thoughts.append(content.split("</think>")[0].split("<think>")[-1])
    for thought in thoughts:
        if thought.strip() not in rest:
            raise InputError(
                f"{where}: the chat template leaves out the thought of an answer that is trained on; set "
                "data.chat_template_kwargs or data.chat_template so that it is printed, or remove the thought."
            )
