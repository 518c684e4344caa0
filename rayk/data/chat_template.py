"""A chat template: messages to text."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayk.config import DataConfig
from rayk.config.data import SHIPPED_TEMPLATES
from rayk.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]


class ChatTemplate:
    """Render messages in a chat template.

    Args:
        tokenizer: gives the template and the special tokens that it prints.
        template: the text of a template, instead of the tokenizer's own.
        kwargs: variables of the template, such as `enable_thinking`.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template: str | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer, self.template, self.kwargs = tokenizer, template, dict(kwargs or {})

    @classmethod
    def from_settings(cls, data: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> "ChatTemplate":
        """Return the template in which a run's rows are rendered.

        Raises:
            InputError: the file of the template cannot be read.
        """
        template = read_template(data.chat_template) if isinstance(data.chat_template, str) else None
        return cls(tokenizer, template, data.chat_template_kwargs)

    def render(
        self,
        messages: list[Message],
        where: str,
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """Render messages, with the schemas of the tools that the model may call.

        Raises:
            InputError: there is no template, or it fails on these messages.
        """
        from jinja2 import TemplateError

        if not (self.template or self.tokenizer.chat_template):
            raise InputError(
                f"{where} requires a chat template, but the tokenizer has none; set data.chat_template to a .jinja "
                f"file or to one of: {', '.join(SHIPPED_TEMPLATES)}; or use prompt and completion fields without "
                "data.chat_template."
            )
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.kwargs,
            )
            return str(text)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise InputError(f"{where}: the chat template fails on these messages: {error}") from error


def read_template(name: str) -> str:
    """Return the text of a shipped template, or of a file.

    Raises:
        InputError: there is no such template, or the file cannot be read.
    """
    path = Path(__file__).parent / "templates" / f"{name}.jinja" if name in SHIPPED_TEMPLATES else Path(name)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"data.chat_template '{name}' is neither a file with a template nor one of: "
            f"{', '.join(SHIPPED_TEMPLATES)}; give the path of a .jinja file or one of these names."
        ) from error
