"""Instructions that a chat model generates by itself, and its responses: Magpie (Xu et al. 2024, arXiv 2406.08464).

Given only the tokens that precede a user's text in its chat template, an aligned model continues as a user (§2.1, step
1): n instructions, sampled at temperature 1 without truncation, each up to the token that ends the turn or the next
role's name in plain text. Each instruction is then put into the template and answered greedily (step 2). The paper's
filters (§2.2) are `instruction_filters`, applied before responses are requested, then the run's `filters`, then
`keep_longest`.

Seeds depend on an instruction's position, so more instructions or other filters do not change earlier requests.
"""

import datetime
import re
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from rayk.config import MagpieConfig, TeacherConfig
from rayk.data.chat_template import ChatTemplate
from rayk.data.text_encoder import TextEncoder
from rayk.engines.base import SamplingParameters
from rayk.errors import InputError
from rayk.models import load_tokenizer
from rayk.synthesis.base import (
    MISSING_RESPONSE,
    Candidate,
    PromptGeneratingRecipe,
    Statistic,
    completion_problem,
    completion_text,
    sampling_parameters,
)
from rayk.synthesis.chat_turns import find_chat_turns
from rayk.synthesis.completions import CompletionClient
from rayk.synthesis.concurrency import run_in_order
from rayk.synthesis.prompts import Prompt
from rayk.synthesis.requests import CompletionRequest
from rayk.synthesis.store import StoredCompletion
from rayk.text import build_filters, find_rejection, words

_INSTRUCTION, _RESPONSE = 20, 21  # the first number of a seed's position


@dataclass(frozen=True)
class _Instruction:
    """An instruction with its position among all sampled ones and the model's response that contains it."""

    text: str
    position: int
    response: StoredCompletion


class Magpie(PromptGeneratingRecipe[MagpieConfig]):
    """Recipe `magpie`; see the module."""

    summary = "instructions that a chat model generates from the beginning of a user's turn, and its responses to them"
    paper = "Xu et al. 2024, arXiv 2406.08464"

    def __init__(self, settings: MagpieConfig, prompts: Sequence[Prompt], client: CompletionClient):
        super().__init__(settings, prompts, client)
        teacher = client.teacher
        is_endpoint = teacher.info.engine == "openai"
        if is_endpoint and (client.uses_chat or settings.tokenizer is None):
            raise InputError(
                f"synthesis 'magpie' sends the beginning of a user's turn: for the endpoint '{teacher.name}' set "
                "engine.chat: false and synthesis.tokenizer, the tokenizer with its chat template."
            )
        name = settings.tokenizer or teacher.info.model
        self._encoder = _load_encoder(name, teacher.settings, client.date)
        self._turns = find_chat_turns(self._encoder, settings.system, _template_owner(settings, teacher.name))
        # An endpoint adds the tokenizer's prefix (such as BOS) to each prompt itself.
        self._endpoint_prefix = str(self._encoder.tokenizer.decode(self._encoder.prefix)) if is_endpoint else ""
        self._filters = build_filters(settings.instruction_filters)
        # Stop texts, not token ids: engines find special tokens by their text too, and endpoints accept only text.
        self._instruction_parameters = _add_stop(
            sampling_parameters(settings.sampling), self._turns.user_ends, *settings.role_words,
            *(["\n"] if settings.stop_at_newline else []),
        )  # fmt: skip
        self._response_parameters = _add_stop(sampling_parameters(settings.responses), self._turns.assistant_ends)

    @classmethod
    def check(cls, settings: MagpieConfig, teacher: TeacherConfig) -> None:
        build_filters(settings.instruction_filters)
        model = teacher.model if teacher.gives_signals else None
        if name := settings.tokenizer or model:
            find_chat_turns(_load_encoder(name, teacher), settings.system, _template_owner(settings, teacher.name))

    @classmethod
    def seed_prompts(cls, settings: MagpieConfig) -> list[Prompt]:
        return [Prompt(settings.system or "", "the chat template's user turn", {})]

    @property
    def max_requests(self) -> int:
        return 2 * self.settings.instructions

    async def candidates(self) -> AsyncGenerator[Candidate, None]:
        """Yield the rejected instructions, then the others with their responses."""
        self.client.total = self.max_requests
        accepted: list[_Instruction] = []
        work = (self._sample_instruction(position) for position in range(self.settings.instructions))
        async with aclosing(run_in_order(work, self.settings.in_flight)) as instructions:
            async for instruction in instructions:
                if (problem := self._instruction_problem(instruction)) is None:
                    accepted.append(instruction)
                else:
                    yield Candidate(instruction.text, "", 0, (instruction.response,)).reject(*problem)
        self.client.total = self.client.done + len(accepted)
        responses = (self._respond(instruction) for instruction in accepted)
        async with aclosing(run_in_order(responses, self.settings.in_flight)) as candidates:
            async for candidate in candidates:
                yield candidate

    async def _sample_instruction(self, position: int) -> _Instruction:
        seed = self.client.seed(_INSTRUCTION, position)
        raw_prompt = self._raw_prompt(self._turns.user_begins)
        request = CompletionRequest(self.settings.system or "", seed, self._instruction_parameters, raw_prompt)
        response = await self.client.complete(request)
        return _Instruction(completion_text(response, self._instruction_parameters.stop).strip(), position, response)

    def _instruction_problem(self, instruction: _Instruction) -> tuple[str, str] | None:
        """Return the check that an instruction fails, and the reason; None if it passes (the filters remember it)."""
        response = instruction.response
        if problem := completion_problem(response, instruction.text):
            return problem
        # Some endpoints generate beyond the stop text.
        has_ended = any(end in response.text for end in self._instruction_parameters.stop)
        if response.finish_reason == "length" and not has_ended:
            return "unfinished", "the instruction was truncated at synthesis.sampling.max_new_tokens"
        if word := self._role_word_within(response):
            return "role_word", f"the instruction breaks off before {word!r} within a line"
        candidate = {
            "prompt": instruction.text, "completion": instruction.text, "finish_reason": response.finish_reason,
            "tokens": response.tokens,
        }  # fmt: skip
        rejection = find_rejection(candidate, self._filters)
        return None if rejection is None else (f"instruction {rejection.filter}", rejection.reason)

    def _role_word_within(self, response: StoredCompletion) -> str | None:
        """Return the role word that ended an instruction but was part of its text ("ad for a virtual assistant")."""
        for word in self.settings.role_words:
            before, found, _ = response.text.partition(word)
            if found and _breaks_off(before):
                return word
        # Endpoints drop the stop text, but not the space before it.
        is_dropped = self.client.teacher.info.engine == "openai" and _breaks_off(response.text)
        return next(iter(self.settings.role_words), None) if is_dropped else None

    async def _respond(self, instruction: _Instruction) -> Candidate:
        messages = [{"role": "user", "content": instruction.text}]
        raw_prompt = self._raw_prompt(
            self._encoder.chat_template.render(messages, "synthesis 'magpie'", add_generation_prompt=True)
        )
        seed = self.client.seed(_RESPONSE, instruction.position)
        request = CompletionRequest(instruction.text, seed, self._response_parameters, raw_prompt)
        response = await self.client.complete(request)
        text = completion_text(response, self._response_parameters.stop)
        candidate = Candidate(instruction.text, text, 0, (response, instruction.response))
        problem = completion_problem(response, text)
        return candidate if problem is None else candidate.reject(*problem)

    def _raw_prompt(self, text: str) -> str:
        return text.removeprefix(self._endpoint_prefix)

    def select(self, accepted: list[Candidate]) -> list[Candidate]:
        count = self.settings.keep_longest
        if count is None or len(accepted) <= count:
            return accepted
        order = sorted(range(len(accepted)), key=lambda i: (-len(accepted[i].completion), i))
        shortest = len(accepted[order[count - 1]].completion)
        reason = f"{count} responses are at least as long; the shortest of them has {shortest} characters"
        selected = set(order[:count])
        return [each if i in selected else each.reject("not_longest", reason) for i, each in enumerate(accepted)]

    def statistics(self, candidates: Sequence[Candidate]) -> list[Statistic]:
        sampled = [each for each in candidates if len(each.responses) > 1 or each.rejected_by not in MISSING_RESPONSE]
        kept = [each for each in candidates if not each.rejected_by]
        if not sampled or not kept:
            return []
        used = sum(len(each.responses) > 1 for each in sampled)
        return [
            Statistic("instructions that could be used", used / len(sampled)),
            Statistic("words an instruction", sum(len(words(each.prompt)) for each in kept) / len(kept), share=False),
            Statistic("words an answer", sum(len(words(each.completion)) for each in kept) / len(kept), share=False),
        ]


def _breaks_off(text: str) -> bool:
    """Return whether the text ends within a sentence: with a space that follows no punctuation."""
    return re.search(r"[^\s.!?…。！？:;)\"'”’»*`][ \t]+\Z", text) is not None


def _load_encoder(name: str, teacher: TeacherConfig, date: datetime.date | None = None) -> TextEncoder:
    tokenizer = load_tokenizer(name, trust_remote_code=teacher.trust_remote_code)
    return TextEncoder(tokenizer, ChatTemplate(tokenizer, None, teacher.chat_template_kwargs, date))


def _template_owner(settings: MagpieConfig, teacher: str) -> str:
    """Return the owner of the chat template, for error messages."""
    return f"teacher '{teacher}'" if settings.tokenizer is None else f"synthesis.tokenizer '{settings.tokenizer}'"


def _add_stop(parameters: SamplingParameters, *stop: str) -> SamplingParameters:
    """Return the parameters with additional stop texts; empty ones are ignored."""
    texts = dict.fromkeys((*filter(None, stop), *parameters.stop))
    return SamplingParameters(parameters.max_new_tokens, parameters.temperature, parameters.top_p, stop=tuple(texts))
