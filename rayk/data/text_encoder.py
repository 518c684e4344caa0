"""Text into token ids with the positions that count: the token rules for pairs, messages and plain text.

A prompt is tokenised apart from what follows it, so that a student is trained after the very tokens it is later asked
to go on from.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rayk.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]


@dataclass(frozen=True)
class Tokens:
    """Token ids, the spans of them that count as (first, past the last), and how many make the prompt."""

    input_ids: list[int]
    spans: list[Span]
    prompt_tokens: int

    def counted(self) -> np.ndarray:
        """bool [length], True inside the spans; position 0 never counts."""
        counted = np.zeros(len(self.input_ids), dtype=np.bool_)
        for first, end in self.spans:
            counted[first:end] = True
        counted[:1] = False
        return counted


class TextEncoder:
    """A tokenizer with what the token rules need of it.

    Raises:
        InputError: the tokenizer has no end-of-sequence token, or adds its special tokens inside the text.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if tokenizer.eos_token_id is None:
            raise InputError(
                "The tokenizer has no end-of-sequence token, so nothing says where a completion ends; set eos_token "
                "in its tokenizer_config.json."
            )
        self.tokenizer = tokenizer
        self.eos_id: int = tokenizer.eos_token_id
        added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special_ids = added | set(tokenizer.all_special_ids)
        self.prefix = self._prefix()

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, nothing added."""
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def _prefix(self) -> list[int]:
        """What the tokenizer puts before a text (BOS). What it puts after one (EOS) has no place behind a prompt."""
        bare = self.encode(["a"])[0]
        whole = self.tokenizer("a", return_attention_mask=False)["input_ids"]
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return whole[:start]
        raise InputError("The tokenizer changes a text's own tokens when it adds special ones; rayk cannot use it.")

    def prompts(self, texts: list[str]) -> list[list[int]]:
        """The ids of each prompt, with the tokenizer's prefix."""
        return [self.prefix + ids for ids in self.encode(texts)]

    def pairs(self, prompts: list[str], completions: list[str]) -> list[Tokens]:
        """Prompt and completion, tokenised apart and joined; the completion and its EOS count."""
        pairs = zip(self.prompts(prompts), self.encode(completions), strict=True)
        return [self._ended(prompt, completion) for prompt, completion in pairs]

    def texts(self, texts: list[str]) -> list[Tokens]:
        """Plain texts, which count from position 1 through EOS."""
        tokens = [self._ended([], self.prefix + ids) for ids in self.encode(texts)]
        return [Tokens(each.input_ids, [(1, len(each.input_ids))], 0) for each in tokens]

    def _ended(self, prompt: list[int], completion: list[int]) -> Tokens:
        ended = completion if completion[-1:] == [self.eos_id] else [*completion, self.eos_id]
        ids = prompt + ended
        return Tokens(ids, [(len(prompt), len(ids))], len(prompt))

    def chat_prompt(self, messages: list[dict[str, Any]], where: str) -> list[int]:
        """The ids of messages with the generation prompt behind them."""
        return self.encode([self.render(messages, where, add_generation_prompt=True)])[0]

    def chat(self, messages: list[dict[str, Any]], turns: list[int], where: str) -> Tokens:
        """Messages as the chat template writes them; the assistant turns at the indices `turns` count.

        A turn's span is what the template writes for it behind the generation prompt, through its end-of-turn token.
        If the template has none, EOS ends the last turn. What follows the last counted token is cut off.

        Raises:
            InputError: the template fails on these messages or is not prefix-stable.
        """
        whole = self.render(messages, where)
        ids: list[int] = []
        spans: list[Span] = []
        done = 0
        for turn in turns:
            start, end = self._span(whole, messages, turn, where)
            ids = self._extended(ids, whole, done, start)
            first = len(ids)
            ids = self._extended(ids, whole, start, end)
            spans.append((first, self._through_end_token(ids, first)))
            done = end
        first, end = spans[-1]
        ids = ids[:end]
        if turns[-1] == len(messages) - 1 and ids[-1] not in self.special_ids:
            ids.append(self.eos_id)
            spans[-1] = (first, end + 1)
        return Tokens(ids, spans, first)

    def _span(self, whole: str, messages: list[dict[str, Any]], turn: int, where: str) -> Span:
        """Where in the whole text the turn at index `turn` starts and ends, in characters."""
        before = self.render(messages[:turn], where, add_generation_prompt=True)
        through = self.render(messages[: turn + 1], where)
        if not (through.startswith(before) and whole.startswith(through)):
            raise InputError(
                f"{where}: the tokenizer's chat template is not prefix-stable (what it writes for the first "
                f"{turn + 1} messages depends on what follows, or is not what its generation prompt begins), so the "
                f"tokens of an assistant turn cannot be told; train on the last turn only, or give another template."
            )
        return len(before), len(through)

    def _extended(self, ids: list[int], text: str, start: int, end: int) -> list[int]:
        """The ids of text[:end], given those of text[:start], which stay as they are.

        Where a token would straddle the border, the two sides are tokenised apart, as they are in generation.
        """
        joint = self.encode([text[:end]])[0]
        return joint if joint[: len(ids)] == ids else ids + self.encode([text[start:end]])[0]

    def _through_end_token(self, ids: list[int], first: int) -> int:
        """Past the last special token of ids[first:], if nothing but white space follows it; else the end."""
        for i in range(len(ids) - 1, first - 1, -1):
            if ids[i] in self.special_ids:
                return len(ids) if str(self.tokenizer.decode(ids[i + 1 :])).strip() else i + 1
        return len(ids)

    def render(self, messages: list[dict[str, Any]], where: str, *, add_generation_prompt: bool = False) -> str:
        """Messages as the chat template writes them.

        Raises:
            InputError: there is no template, or it fails on these messages.
        """
        from jinja2 import TemplateError

        if not self.tokenizer.chat_template:
            raise InputError(
                f"{where} needs a chat template, and the tokenizer has none; give the tokenizer one, or use prompt and "
                f"completion fields without data.chat_template."
            )
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
            return str(text)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise InputError(f"{where}: the tokenizer's chat template does not take these messages: {error}") from error
