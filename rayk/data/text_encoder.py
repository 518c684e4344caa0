"""Encode prompt/completion pairs, messages and plain text into token ids, and mark the counted tokens.

A prompt is tokenized separately from its completion, so the student is trained after exactly the tokens from which it
generates later.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rayk.data.chat_template import ChatTemplate
from rayk.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
Tools = list[dict[str, Any]] | None


@dataclass(frozen=True)
class Tokens:
    """Token ids, the counted spans (first, end) with `end` exclusive, and the number of prompt tokens."""

    input_ids: list[int]
    spans: list[Span]
    prompt_tokens: int

    def counted(self) -> np.ndarray:
        """Return the mask of the spans, bool [length]; position 0 is never counted."""
        counted = np.zeros(len(self.input_ids), dtype=np.bool_)
        for first, end in self.spans:
            counted[first:end] = True
        counted[:1] = False
        return counted


class TextEncoder:
    """Encode texts with a tokenizer.

    Args:
        tokenizer: a transformers tokenizer with an EOS token.
        chat_template: the template of messages; None: the tokenizer's own.

    Attributes:
        prefix: token ids that the tokenizer adds before a text (BOS). Ids that it adds after a text (EOS) are not used
            for prompts, because a completion follows.

    Raises:
        InputError: the tokenizer has no end-of-sequence token, or adds special tokens inside a text.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", chat_template: ChatTemplate | None = None) -> None:
        if tokenizer.eos_token_id is None:
            raise InputError(
                "The tokenizer has no end-of-sequence token, so the end of a completion cannot be marked; set "
                "eos_token in its tokenizer_config.json."
            )
        self.tokenizer = tokenizer
        self.chat_template = chat_template or ChatTemplate(tokenizer)
        self.eos_id: int = tokenizer.eos_token_id
        added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special_ids = added | set(tokenizer.all_special_ids)
        self.prefix = self._prefix()

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens."""
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def _prefix(self) -> list[int]:
        bare = self.encode(["a"])[0]
        whole = self.tokenizer("a", return_attention_mask=False)["input_ids"]
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return whole[:start]
        raise InputError(
            "The tokenizer changes the tokens of a text when it adds special tokens; use another tokenizer."
        )

    def prompts(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each prompt, after the tokenizer's prefix."""
        return [self.prefix + ids for ids in self.encode(texts)]

    def pairs(self, prompts: list[str], completions: list[str]) -> list[Tokens]:
        """Tokenize prompts and completions separately and concatenate them; the completion and its EOS are counted."""
        pairs = zip(self.prompts(prompts), self.encode(completions), strict=True)
        return [self._append_eos(prompt, completion) for prompt, completion in pairs]

    def texts(self, texts: list[str]) -> list[Tokens]:
        """Tokenize plain texts; all tokens from position 1 through EOS are counted."""
        tokens = [self._append_eos([], self.prefix + ids) for ids in self.encode(texts)]
        return [Tokens(text.input_ids, [(1, len(text.input_ids))], 0) for text in tokens]

    def _append_eos(self, prompt: list[int], completion: list[int]) -> Tokens:
        ended = completion if completion[-1:] == [self.eos_id] else [*completion, self.eos_id]
        ids = prompt + ended
        return Tokens(ids, [(len(prompt), len(ids))], len(prompt))

    def chat_prompt(self, messages: list[dict[str, Any]], where: str, tools: Tools = None) -> list[int]:
        """Return the ids of messages followed by the generation prompt."""
        return self.encode([self.chat_template.render(messages, where, tools=tools, add_generation_prompt=True)])[0]

    def chat(self, messages: list[dict[str, Any]], turns: list[int], where: str, tools: Tools = None) -> Tokens:
        """Render messages in the chat template and tokenize them, with the assistant turns at indices `turns` counted.

        The span of a turn starts after the generation prompt and ends with the end-of-turn token. Without such a token,
        EOS ends the last turn. Tokens after the last counted token are removed.

        Raises:
            InputError: the template fails on these messages or is not prefix-stable.
        """
        whole = self.chat_template.render(messages, where, tools=tools)
        ids: list[int] = []
        spans: list[Span] = []
        done = 0
        for turn in turns:
            start, end = self._span(whole, messages, turn, where, tools)
            ids = self._extend_ids(ids, whole, done, start)
            first = len(ids)
            ids = self._extend_ids(ids, whole, start, end)
            spans.append((first, self._end_of_turn(ids, first)))
            done = end
        first, end = spans[-1]
        ids = ids[:end]
        if turns[-1] == len(messages) - 1 and ids[-1] not in self.special_ids:
            ids.append(self.eos_id)
            spans[-1] = (first, end + 1)
        return Tokens(ids, spans, first)

    def _span(self, whole: str, messages: list[dict[str, Any]], turn: int, where: str, tools: Tools) -> Span:
        """Return start and end of the turn at index `turn` in the whole text, in characters."""
        before = self.chat_template.render(messages[:turn], where, tools=tools, add_generation_prompt=True)
        through = self.chat_template.render(messages[: turn + 1], where, tools=tools)
        if not (through.startswith(before) and whole.startswith(through)):
            raise InputError(
                f"{where}: the tokenizer's chat template is not prefix-stable (the text of the first {turn + 1} "
                f"messages depends on later ones, or does not start with the generation prompt), so the tokens of an "
                f"assistant turn are ambiguous; train on the last turn only, or use another template."
            )
        return len(before), len(through)

    def _extend_ids(self, ids: list[int], text: str, start: int, end: int) -> list[int]:
        """Return the ids of text[:end], which start with `ids`, the ids of text[:start].

        If a token would cross the boundary, both sides are tokenized separately, as in generation.
        """
        joint = self.encode([text[:end]])[0]
        return joint if joint[: len(ids)] == ids else ids + self.encode([text[start:end]])[0]

    def _end_of_turn(self, ids: list[int], first: int) -> int:
        """Return the position after the last special token of ids[first:] if only whitespace follows, else the end."""
        for i in range(len(ids) - 1, first - 1, -1):
            if ids[i] in self.special_ids:
                return len(ids) if str(self.tokenizer.decode(ids[i + 1 :])).strip() else i + 1
        return len(ids)
