"""Encode prompt/completion pairs, messages and plain text into token ids, and mark the counted tokens.

A completion continues exactly the tokens of its prompt, from which the student generates later. Tokenizers that put a
space before each text (as SentencePiece does for Llama 2) tokenize prompt and completion together where the prompt's
tokens stay the same, so that no space is added between them.
"""

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from rayk.data.assistant_turns import Turn, TurnReader
from rayk.data.chat_template import ChatTemplate, Message, Tools
from rayk.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]

_ANCHOR = "\n"
_SPACES = ("▁", "Ġ")


@dataclass(frozen=True)
class Tokens:
    """A tokenized row.

    Attributes:
        input_ids: the token ids.
        spans: the counted tokens as (first, end), with `end` exclusive.
        prompts: number of tokens before each completion.
        limited_prompt: number of tokens to which the limit of prompts applies; None: those before the first completion.
    """

    input_ids: list[int]
    spans: list[Span]
    prompts: tuple[int, ...]
    limited_prompt: int | None = None

    def prompt_tokens(self, length: int | None = None) -> int:
        """Return the number of tokens before the last completion of which a token is among the first `length` ones."""
        inside = [prompt for prompt in self.prompts if length is None or prompt < length]
        return inside[-1] if inside else self.prompts[0]

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
        counts_template_text: also count what the template prints between the generation prompt and a row's own text.

    Attributes:
        prefix: token ids that the tokenizer adds before a text (BOS). Ids that it adds after a text (EOS) are not used
            for prompts, because a completion follows.

    Raises:
        InputError: the tokenizer has no end-of-sequence token, or adds special tokens inside a text.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        chat_template: ChatTemplate | None = None,
        counts_template_text: bool = False,
    ) -> None:
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
        first_token = str(tokenizer.convert_ids_to_tokens(self.encode(["b"])[0][0]))
        self._adds_space = first_token.startswith(_SPACES)
        special = frozenset(map(str, tokenizer.convert_ids_to_tokens(sorted(self.special_ids))))
        self._turns = TurnReader(self.chat_template, special, str(tokenizer.eos_token), counts_template_text)

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
        """Tokenize prompts with their completions; the completion and its EOS are counted."""
        prompt_ids = self.prompts(prompts)
        if not self._adds_space:
            completion_ids = self.encode(completions)
        else:
            texts = zip(prompts, completions, strict=True)
            joint = self.prompts([prompt + completion for prompt, completion in texts])
            completion_ids = [
                whole[len(ids) :] if whole[: len(ids)] == ids else self.continuation(completion)
                for ids, whole, completion in zip(prompt_ids, joint, completions, strict=True)
            ]
        return [self._append_eos(*ids) for ids in zip(prompt_ids, completion_ids, strict=True)]

    def continuation(self, text: str) -> list[int]:
        """Return the ids of a text that continues another, without the space that the tokenizer puts before texts."""
        return self.continuations([text])[0]

    def continuations(self, texts: list[str]) -> list[list[int]]:
        """Return `continuation` of each text."""
        if not self._adds_space:
            return self.encode(texts)
        anchor, *anchored = self.encode([_ANCHOR, *(_ANCHOR + text for text in texts)])
        return [
            ids[len(anchor) :] if ids[: len(anchor)] == anchor else self.encode([text])[0]
            for text, ids in zip(texts, anchored, strict=True)
        ]

    def as_continuation(self, ids: list[int]) -> list[int]:
        """Return the ids of a text that is to follow other text, from `ids`, its ids as a text of its own."""
        if not self._adds_space:
            return ids
        text = self.tokenizer.decode(ids)
        text = text if self.encode([text])[0] == ids else text.removeprefix(" ")
        return self.continuation(text) if self.encode([text])[0] == ids else ids

    def texts(self, texts: list[str]) -> list[Tokens]:
        """Tokenize plain texts; all tokens from position 1 through EOS are counted."""
        tokens = [self._append_eos([], self.prefix + ids) for ids in self.encode(texts)]
        return [Tokens(text.input_ids, [(1, len(text.input_ids))], (0,)) for text in tokens]

    def _append_eos(self, prompt: list[int], completion: list[int]) -> Tokens:
        ended = completion if completion[-1:] == [self.eos_id] else [*completion, self.eos_id]
        ids = prompt + ended
        return Tokens(ids, [(len(prompt), len(ids))], (len(prompt),))

    def chat_prompt(self, messages: list[Message], where: str, tools: Tools = None) -> list[int]:
        """Return the ids of messages followed by the generation prompt; errors as `chats`."""
        messages = self._turns.without_end_marks(messages)
        self.chat_template.check_rendered(messages, where, tools)
        return self.encode([self.chat_template.render(messages, where, tools=tools, add_generation_prompt=True)])[0]

    def chat(self, messages: list[Message], turns: list[int], where: str, tools: Tools = None) -> Tokens:
        """Render and tokenize messages as one sequence, with the assistant turns at indices `turns` counted.

        Raises:
            InputError: see `chats`; or the turns cannot be in one sequence.
        """
        sequences = self.chats(messages, turns, where, tools)
        if len(sequences) > 1:
            raise InputError(
                f"{where}: the chat template prints earlier assistant turns differently from the last one, so they "
                "cannot be in one sequence; train on the last turn only."
            )
        return sequences[0]

    def chats(self, messages: list[Message], turns: list[int], where: str, tools: Tools = None) -> list[Tokens]:
        """Render and tokenize messages, with the assistant turns at indices `turns` counted.

        A turn is counted from the generation prompt, or the row's own text if the template prints text before it,
        through the end-of-turn token; without such a token EOS ends it. Tokens after the last counted one are removed.

        Returns:
            One sequence; or one for each turn if the template prints earlier turns differently from the last one (as
            Qwen3, which drops their thoughts), so that each turn follows the text that the model reads at inference.

        Raises:
            InputError: the template fails on these messages, leaves out a part of them, or prints an answer that
                cannot follow its generation prompt.
        """
        messages = self._turns.without_end_marks(messages)
        self.chat_template.check_rendered(messages, where, tools)
        read = [self._turns.read(messages, turn, where, tools) for turn in turns]
        if len(read) == 1 or self._fit_together(read):
            return [self._encode_turns(read)]
        sequences = [self._encode_turns([turn]) for turn in read]
        return [replace(tokens, limited_prompt=sequences[0].prompts[0]) for tokens in sequences]

    @staticmethod
    def _fit_together(turns: list[Turn]) -> bool:
        """Return whether each turn is a beginning of the next one's prompt, so that one sequence contains all."""
        return all(
            not turn.ends_with_eos and following.prompt.startswith(turn.text)
            for turn, following in itertools.pairwise(turns)
        )

    def end_of_answer(self, messages: list[Message], where: str) -> int | None:
        """Return the special token with which the chat template ends an answer to `messages`; None if it ends answers
        with ordinary text, or cannot render one."""
        try:
            answered = self.chat([*messages, {"role": "assistant", "content": "a"}], [len(messages)], where)
        except InputError:
            return None
        last = answered.input_ids[-1]
        return last if last in self.special_ids else None

    def _encode_turns(self, turns: list[Turn]) -> Tokens:
        """Tokenize turns, each of which begins with the text of the one before."""
        ids: list[int] = []
        text, spans, prompts = "", list[Span](), list[int]()
        for turn in turns:
            ids = self._extend_ids(ids, text, turn.prompt[len(text) :])
            prompts.append(len(ids))
            text = turn.prompt
            for part, counted in turn.parts:
                first = len(ids)
                ids = self._extend_ids(ids, text, part)
                text += part
                spans += [(first, len(ids))] if counted else []
        if turns[-1].ends_with_eos and ids[-1] != self.eos_id:
            ids.append(self.eos_id)
            spans[-1] = (spans[-1][0], len(ids))
        return Tokens(ids, spans, tuple(prompts))

    def _extend_ids(self, ids: list[int], text: str, part: str) -> list[int]:
        """Return the ids of text + part, which start with `ids`, the ids of `text`.

        If a token would cross the boundary, both sides are tokenized separately, as in generation.
        """
        joint = self.encode([text + part])[0]
        return joint if joint[: len(ids)] == ids else ids + self.continuation(part)
