"""Rollouts of several turns: a function of the user's, such as a tool or a game, answers each turn of the student.

    prompt, turn 1, answer 1, turn 2, answer 2, …, turn n

The ids of a turn stay as they were sampled. Answers are tokenized as the chat template prints them after an assistant's
message, through the generation prompt of the next turn; their tokens are not counted.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from rayk.config import DataConfig, ToolConfig
from rayk.data.chat_template import MARK, ChatTemplate, Message
from rayk.data.examples import Example
from rayk.data.text_encoder import TextEncoder
from rayk.engines.base import SamplingParameters
from rayk.engines.batching import gather
from rayk.engines.speculative import MixedSampling
from rayk.errors import InputError
from rayk.rollouts.policy import Policy, Rollout
from rayk.rollouts.teacher_mixed import Verify
from rayk.signals.sequence import TokenSequence
from rayk.text.functions import call_function, load_function

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SETTING = "rollouts.tool"


class Tool:
    """A user's function that answers turns, and the token ids of its answers.

    Raises:
        InputError: the function cannot be loaded, or the chat template cannot print its answers.
    """

    def __init__(self, settings: ToolConfig, data: DataConfig, tokenizer: "PreTrainedTokenizerBase"):
        self.settings = settings
        self._function = load_function(settings.function, f"{_SETTING}.function")
        self._template = ChatTemplate.from_settings(data, tokenizer)
        self._encoder = TextEncoder(tokenizer, self._template)
        if MARK not in self._print(MARK):
            raise InputError(
                f"{_SETTING}.role: the chat template does not print messages of role {settings.role} after an "
                "assistant's answer; set it to 'user', or set data.chat_template to another template."
            )
        around = len(self._encoder.continuation(self._print("")))
        if around >= settings.max_answer_tokens:
            raise InputError(
                f"{_SETTING}.max_answer_tokens is {settings.max_answer_tokens}, but the chat template prints {around} "
                "tokens around an answer; raise it."
            )

    def answer(self, messages: list[Message], row: Example) -> str | None:
        """Return the function's answer to the last of `messages`, which the rollout has added to the prompt; None ends
        the rollout.

        Raises:
            InputError: the function fails, or returns anything else.
        """
        name = self.settings.function
        answer = call_function(self._function, name, f"{_SETTING}.function", row.where, messages, dict(row.fields))
        if answer is not None and not isinstance(answer, str):
            raise InputError(
                f"{_SETTING}.function: '{name}' returns {answer!r:.60} for {row.where}; return a text or None."
            )
        return answer

    def encode(self, answer: str, last_id: int) -> np.ndarray:
        """Return the ids that follow a turn, through the generation prompt of the next one, int32 [length].

        Args:
            last_id: the turn's last token. If it is the first token that the template prints after a turn, it is not
                repeated.
        """
        ids = self._encoder.continuation(self._print(answer))
        while (excess := len(ids) - self.settings.max_answer_tokens) > 0:
            kept = self._encoder.tokenizer.decode(self._encoder.encode([answer])[0][:-excess])
            kept = kept.rstrip("\N{REPLACEMENT CHARACTER}")  # the beginning of a character that was cut
            answer = kept if len(kept) < len(answer) else answer[:-1]  # some tokens have no text
            ids = self._encoder.continuation(self._print(answer))
        return np.array(ids[1:] if ids[:1] == [last_id] else ids, np.int32)

    def _print(self, answer: str) -> str:
        """Return what the chat template prints after the text of a turn."""
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
        messages.append({"role": self.settings.role, "content": answer})
        return self._template.render(messages, _SETTING, add_generation_prompt=True).partition(MARK)[2]


@dataclass
class _Conversation:
    """A rollout that grows turn by turn.

    Attributes:
        row: the prompt, and after the first turn all ids so far, as the prompt of the next turn.
        turns: the rollouts of the single turns.
        counted: a mask for each turn and each answer.
        messages: the turns and the answers.
    """

    row: Example
    turns: list[Rollout] = field(default_factory=list)
    counted: list[np.ndarray] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)

    def add_turn(self, turn: Rollout) -> None:
        self.turns.append(turn)
        self.counted.append(np.ones(turn.counted_tokens, bool))
        self.messages.append({"role": "assistant", "content": turn.text})

    def add_answer(self, role: str, answer: str, ids: np.ndarray) -> None:
        row = np.concatenate([self.turns[-1].input_ids, ids])
        self.row = replace(self.row, input_ids=row, counted=np.zeros(len(row), bool), prompt_tokens=len(row))
        self.counted.append(np.zeros(len(ids), bool))
        self.messages.append({"role": role, "content": answer})

    def rollout(self) -> Rollout:
        """Return the whole rollout. Its text is that of the last turn."""
        last, prompt_tokens = self.turns[-1], self.turns[0].prompt_tokens
        return replace(
            last, prompt_tokens=prompt_tokens, counted=np.concatenate([np.zeros(prompt_tokens, bool), *self.counted]),
            logprobs=np.concatenate([turn.logprobs for turn in self.turns]), turns=len(self.turns),
        )  # fmt: skip


class ToolPolicy:
    """A policy whose rollouts go on after a tool's answers; see `Policy`."""

    def __init__(self, policy: Policy, tool: Tool):
        self._policy, self._tool = policy, tool
        self.parameters, self.uses_learner = policy.parameters, policy.uses_learner

    def groups(self, prompts: Sequence[TokenSequence]) -> list[list[int]]:
        """See `Policy`. Groups are made for first turns."""
        return self._policy.groups(prompts)

    async def generate(
        self, prompts: Sequence[Example], parameters: SamplingParameters, seeds: Sequence[int]
    ) -> list[Rollout]:
        """See `Policy`. All rows generate a turn together, and then wait for the slowest answer."""
        conversations = [_Conversation(prompt) for prompt in prompts]
        active = list(range(len(prompts)))
        for turn in range(self._tool.settings.max_turns):
            rows, own_seeds = [conversations[i].row for i in active], [_turn_seed(seeds[i], turn) for i in active]
            for i, one in zip(active, await self._policy.generate(rows, parameters, own_seeds), strict=True):
                conversations[i].add_turn(one)
            ended = [i for i in active if conversations[i].turns[-1].finish_reason == "stop"]
            if turn + 1 < self._tool.settings.max_turns:
                active = await self._answer(conversations, ended)
            if not active:
                break
        return [conversation.rollout() for conversation in conversations]

    async def _answer(self, conversations: list[_Conversation], ended: list[int]) -> list[int]:
        """Add the tool's answers to the conversations of indices `ended`; return the indices of those that go on."""
        calls = (
            asyncio.to_thread(self._tool.answer, conversations[i].messages.copy(), conversations[i].turns[0])
            for i in ended
        )
        answers = {i: answer for i, answer in zip(ended, await gather(calls), strict=True) if answer is not None}
        for i, answer in answers.items():
            ids = self._tool.encode(answer, int(conversations[i].turns[-1].input_ids[-1]))
            conversations[i].add_answer(self._tool.settings.role, answer, ids)
        return list(answers)

    async def generate_mixed(
        self, prompts: Sequence[Example], verify: Verify, sampling: MixedSampling, seeds: Sequence[int]
    ) -> list[Rollout]:
        """Not supported; `RunConfig` rejects settings that require it."""
        raise InputError(f"{_SETTING} answers the student alone; set method.teacher_share to 0.")

    async def top_ids(self, sequences: Sequence[TokenSequence], k: int) -> list[np.ndarray]:
        """See `Policy`."""
        return await self._policy.top_ids(sequences, k)

    async def logprobs(self, sequences: Sequence[TokenSequence]) -> list[np.ndarray]:
        """See `Policy`."""
        return await self._policy.logprobs(sequences)

    def begin(self, attempt: str) -> None:
        """See `Policy`."""
        self._policy.begin(attempt)

    def update(self, version: int) -> None:
        """See `Policy`."""
        self._policy.update(version)

    def wait(self) -> None:
        """See `Policy`."""
        self._policy.wait()


def _turn_seed(seed: int, turn: int) -> int:
    """Return the seed of a turn; the first one has the rollout's own."""
    return seed if turn == 0 else int(np.random.SeedSequence([seed, 2, turn]).generate_state(1, np.uint64)[0])
