"""The form in which a model reads the requests of a recipe: plain text, its chat template, or an endpoint's own."""

import datetime
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rayk.config import TeacherConfig
from rayk.data.chat_template import ChatTemplate
from rayk.data.text_encoder import TextEncoder
from rayk.engines.base import EngineInfo, SamplingParameters
from rayk.errors import InputError
from rayk.models import load_generation_config, load_tokenizer
from rayk.models.ends import end_token_ids
from rayk.synthesis.requests import CompletionRequest
from rayk.synthesis.store import StoredCompletion
from rayk.text.thoughts import split_thought


@dataclass(frozen=True)
class FormattedPrompt:
    """A request's prompt as the model reads it.

    Attributes:
        text: the prompt as text, for the provenance.
        sent: what is sent: text, messages, or token ids [n] int32.
        read: all that the model reads, as text; None if unknown, for an endpoint with a chat template.
    """

    text: str
    sent: Any
    read: str | None


class PromptFormat:
    """The form in which one model reads requests.

    Args:
        info, settings: the model's.
        chat: whether prompts are wrapped in the chat template of the model's tokenizer; None: if it has one and
            `prefers_chat`.
        template: the text of a chat template, instead of the tokenizer's own.
        date: the date that a chat template prints which asks for today's; None: today.

    Attributes:
        wraps: whether prompts are wrapped in the chat template of the model's tokenizer.
        identity: the settings that change what the model reads, as a part of a request's key.

    Raises:
        InputError: prompts are to be wrapped in a chat template, but the tokenizer has none, or the model is an
            endpoint, which has its own.
    """

    def __init__(
        self, info: EngineInfo, settings: TeacherConfig, chat: bool | None, prefers_chat: bool = False,
        template: str | None = None, date: datetime.date | None = None,
    ):  # fmt: skip
        self._info, self._settings = info, settings
        self._encoder: TextEncoder | None = None
        variables = {**settings.chat_template_kwargs, **({"template": template} if template else {})}
        self.identity: dict[str, Any] = getattr(settings.engine, "extra_body", {}) or variables
        if info.engine == "openai":
            if chat:
                raise InputError(
                    f"synthesis.chat: teacher '{settings.name}' is an endpoint, which has a chat template of its own; "
                    "remove synthesis.chat."
                )
            self.wraps = False
            return
        tokenizer = load_tokenizer(info.model, trust_remote_code=settings.trust_remote_code)
        chat_template = ChatTemplate(tokenizer, template, settings.chat_template_kwargs, date)
        self._encoder = TextEncoder(tokenizer, chat_template)
        has_template = bool(template or tokenizer.chat_template)
        self.wraps = has_template and prefers_chat if chat is None else chat
        if self.wraps and not has_template:
            check_chat_template(tokenizer, settings.name)

    @property
    def is_chat(self) -> bool:
        """Whether the model reads prompts as user messages of a chat."""
        return self.wraps or self._info.applies_chat_template

    def format(self, request: CompletionRequest) -> FormattedPrompt:
        """Return a request's prompt as the model reads it.

        Raises:
            InputError: the chat template fails, or a conversation is sent to a model that reads no chat.
        """
        prompt = request.prompt if request.raw_prompt is None else request.raw_prompt
        messages = [dict(message) for message in request.messages]
        if messages and not self.is_chat:
            raise InputError(
                f"A prompt with {len(messages)} messages can only be sent in a chat template, and teacher "
                f"'{self._settings.name}' reads plain text; set synthesis.chat: true (for an endpoint: engine.chat)."
            )
        if self._encoder is None:
            if request.tools:
                raise InputError(
                    f"Rows with tools cannot be sent to teacher '{self._settings.name}', an endpoint, whose calls of "
                    "tools would be lost; remove the rows, or set tools_field to null to leave the tools out."
                )
            return FormattedPrompt(prompt, messages or prompt, None if self.is_chat else prompt)
        if request.raw_prompt is not None:
            return FormattedPrompt(prompt, np.asarray(self._encoder.encode([prompt])[0], np.int32), prompt)
        if not self.wraps:
            return FormattedPrompt(prompt, np.asarray(self._encoder.prompts([prompt])[0], np.int32), prompt)
        messages = messages or [{"role": "user", "content": prompt}]
        ids = self._encoder.chat_prompt(messages, "synthesis.chat", request.tools)
        read = self._encoder.tokenizer.decode(ids)
        return FormattedPrompt(read, np.asarray(ids, np.int32), read)

    def length_error(self, prompt: FormattedPrompt, parameters: SamplingParameters) -> str:
        """Return why the model has no room for a completion of the prompt; empty if it has."""
        limit, sent = self._info.max_tokens, prompt.sent
        if not isinstance(sent, np.ndarray) or len(sent) + parameters.max_new_tokens <= limit:
            return ""
        return (
            f"the prompt of {len(sent)} tokens leaves no room for {parameters.max_new_tokens} new tokens: the model is "
            f"limited to {limit}"
        )

    def trained_ends(self) -> tuple[int, ...]:
        """Return the ids that end a student's completions: its own, and the one that its training teaches."""
        if self._encoder is None:
            return ()
        question = {"role": "user", "content": "a"}
        end = self._encoder.end_of_answer([question], "synthesis") if self.wraps else self._encoder.eos_id
        settings = load_generation_config(self._info.model, trust_remote_code=self._settings.trust_remote_code)
        return end_token_ids(settings, self._encoder.tokenizer, () if end is None else (end,))

    def without_thought(self, completion: StoredCompletion) -> StoredCompletion:
        """Return a completion with its thought apart from its text. One that ends in its thought is truncated."""
        split = split_thought(completion.text)
        if split.answer == completion.text and not split.is_cut:
            return completion
        tokens = completion.tokens
        if tokens is not None and self._encoder is not None:
            tokens = len(self._encoder.encode([split.answer])[0])
        return replace(
            completion, text=split.answer, tokens=tokens, thought=split.thought, is_cut_in_thought=split.is_cut,
            finish_reason="length" if split.is_cut else completion.finish_reason,
        )  # fmt: skip


def check_chat_template(tokenizer: Any, teacher: str) -> None:
    """Check that a teacher's tokenizer has a chat template.

    Raises:
        InputError: it has none.
    """
    if not tokenizer.chat_template:
        raise InputError(
            f"teacher '{teacher}' has no chat template in its tokenizer; add one, or remove 'chat' (for a judge: set "
            "chat: false)."
        )
