"""Instructions that a chat model writes by itself, and its answers: Magpie (Xu et al. 2024, arXiv 2406.08464).

Fed only the tokens that precede a user's text in its own chat template, an aligned model goes on as a user (§2.1, step
1): n instructions, sampled at temperature 1 without truncation, each up to the token that ends the turn, or the next
role's name written out. Each is then asked in that template and answered greedily (step 2). The paper's filters (§2.2)
are `instruction_filters` here, before an answer is paid for, then the run's `filters`, then `keep_longest`.

Instructions and answers are asked for by place, so more of them later, or other filters, ask nothing again.
"""

import re
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from rayk.config import MagpieConfig, TeacherConfig
from rayk.data.tokens import Encoder
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
from rayk.synthesis.completions import CompletionClient, CompletionRequest, run_in_order
from rayk.synthesis.prompts import Prompt
from rayk.synthesis.store import StoredCompletion
from rayk.text import Filter, build_filters, judge, words

_INSTRUCTION, _RESPONSE = 20, 21  # the stages of a seed


@dataclass(frozen=True)
class _Drawn:
    """The instruction that was the `place`th to be drawn."""

    instruction: str
    place: int
    written: StoredCompletion


class Magpie(PromptGeneratingRecipe[MagpieConfig]):
    """See the module."""

    summary = "instructions that a chat model writes at the beginning of a user's turn, and its answers to them"
    paper = "Xu et al. 2024, arXiv 2406.08464"

    def __init__(self, settings: MagpieConfig, prompts: Sequence[Prompt], scribe: CompletionClient):
        super().__init__(settings, prompts, scribe)
        teacher = scribe.teacher
        endpoint = teacher.info.engine == "openai"
        if endpoint and (scribe.chats or settings.tokenizer is None):
            raise InputError(
                f"synthesis 'magpie' feeds the beginning of a user's turn: teacher '{teacher.name}' is an endpoint, "
                "which needs engine.chat: false, and synthesis.tokenizer whose chat template it is."
            )
        name = settings.tokenizer or teacher.info.model
        self._encoder = _encoder_of(name, teacher.settings)
        self._turns = find_chat_turns(self._encoder, settings.system, _place(settings, teacher.name))
        # An endpoint puts the tokenizer's own beginning before what it is sent.
        self._dropped = str(self._encoder.tokenizer.decode(self._encoder.prefix)) if endpoint else ""
        self._filters = _filters(settings)
        line = ("\n",) if settings.stop_at_newline else ()
        # As text: engines look for it among special tokens too, and one set of rules does for endpoints as well.
        self._drawing = _ended(
            sampling_parameters(settings.sampling), self._turns.user_ends, *settings.role_words, *line
        )
        self._answering = _ended(sampling_parameters(settings.responses), self._turns.assistant_ends)

    @classmethod
    def check(cls, settings: MagpieConfig, writer: TeacherConfig) -> None:
        _filters(settings)
        model = writer.model if writer.gives_signals else None
        if name := settings.tokenizer or model:
            find_chat_turns(_encoder_of(name, writer), settings.system, _place(settings, writer.name))

    @classmethod
    def seed_prompts(cls, settings: MagpieConfig) -> list[Prompt]:
        return [Prompt(settings.system or "", "the chat template's user turn", {})]

    @property
    def requests(self) -> int:
        return 2 * self.settings.instructions

    async def candidates(self) -> AsyncGenerator[Candidate, None]:
        """The instructions that were left out, then the others with their answers."""
        self.scribe.total = self.requests
        drawn: list[_Drawn] = []
        work = (self._draw(place) for place in range(self.settings.instructions))
        async with aclosing(run_in_order(work, self.settings.in_flight)) as instructions:
            async for each in instructions:
                if (fault := self._fault(each)) is None:
                    drawn.append(each)
                else:
                    yield Candidate(each.instruction, "", 0, (each.written,)).rejected(*fault)
        self.scribe.total = self.scribe.done + len(drawn)
        answers = (self._answered(each) for each in drawn)
        async with aclosing(run_in_order(answers, self.settings.in_flight)) as answered:
            async for candidate in answered:
                yield candidate

    async def _draw(self, place: int) -> _Drawn:
        seed = self.scribe.seed(_INSTRUCTION, place)
        request = CompletionRequest(self.settings.system or "", seed, self._drawing, self._sent(self._turns.user_begins))
        written = await self.scribe.ask(request)
        return _Drawn(completion_text(written, self._drawing.stop).strip(), place, written)

    def _fault(self, drawn: _Drawn) -> tuple[str, str] | None:
        """The check that an instruction does not pass, and why; one that passes all is remembered."""
        if fault := completion_problem(drawn.written, drawn.instruction):
            return fault
        ended = any(end in drawn.written.text for end in self._drawing.stop)  # some endpoints write on
        if drawn.written.finish_reason == "length" and not ended:
            return "unfinished", "the instruction was cut at synthesis.sampling.max_new_tokens"
        if word := self._cut_by(drawn.written):
            return "role_word", f"the instruction breaks off before {word!r} amid a line"
        text = drawn.instruction
        candidate = {
            "prompt": text, "completion": text, "finish_reason": drawn.written.finish_reason,
            "tokens": drawn.written.tokens,
        }  # fmt: skip
        rejection = judge(candidate, self._filters)
        return None if rejection is None else (f"instruction {rejection.filter}", rejection.reason)

    def _cut_by(self, written: StoredCompletion) -> str | None:
        """The role word that ended an instruction though it belonged to its text ("an ad for a virtual assistant")."""
        for word in self.settings.role_words:
            head, found, _ = written.text.partition(word)
            if found and _breaks_off(head):
                return word
        # Endpoints leave out what ended the text, but not the space before it.
        left_out = self.scribe.teacher.info.engine == "openai" and _breaks_off(written.text)
        return next(iter(self.settings.role_words), None) if left_out else None

    async def _answered(self, drawn: _Drawn) -> Candidate:
        messages = [{"role": "user", "content": drawn.instruction}]
        asked = self._encoder.render(messages, "synthesis 'magpie'", add_generation_prompt=True)
        seed = self.scribe.seed(_RESPONSE, drawn.place)
        written = await self.scribe.ask(CompletionRequest(drawn.instruction, seed, self._answering, self._sent(asked)))
        text = completion_text(written, self._answering.stop)
        candidate = Candidate(drawn.instruction, text, 0, (written, drawn.written))
        fault = completion_problem(written, text)
        return candidate if fault is None else candidate.rejected(*fault)

    def _sent(self, text: str) -> str:
        return text.removeprefix(self._dropped)

    def choose(self, kept: list[Candidate]) -> list[Candidate]:
        longest = self.settings.keep_longest
        if longest is None or len(kept) <= longest:
            return kept
        order = sorted(range(len(kept)), key=lambda i: (-len(kept[i].completion), i))
        least = len(kept[order[longest - 1]].completion)
        reason = f"{longest} answers are as long or longer; the shortest of them has {least} characters"
        chosen = set(order[:longest])
        return [each if i in chosen else each.rejected("not_longest", reason) for i, each in enumerate(kept)]

    def figures(self, candidates: Sequence[Candidate]) -> list[Statistic]:
        came = [each for each in candidates if len(each.written) > 1 or each.rejected_by not in MISSING_RESPONSE]
        kept = [each for each in candidates if not each.rejected_by]
        if not came or not kept:
            return []
        used = sum(len(each.written) > 1 for each in came)
        return [
            Statistic("instructions that could be used", used / len(came)),
            Statistic("words an instruction", sum(len(words(each.prompt)) for each in kept) / len(kept), share=False),
            Statistic("words an answer", sum(len(words(each.completion)) for each in kept) / len(kept), share=False),
        ]


def _breaks_off(text: str) -> bool:
    """Whether another word was to follow: there is a space, and no sentence's end before it."""
    return re.search(r"[^\s.!?…。！？:;)\"'”’»*`][ \t]+\Z", text) is not None


def _filters(settings: MagpieConfig) -> list[Filter]:
    return build_filters(settings.instruction_filters)


def _encoder_of(name: str, teacher: TeacherConfig) -> Encoder:
    return Encoder(load_tokenizer(name, trust_remote_code=teacher.trust_remote_code))


def _place(settings: MagpieConfig, teacher: str) -> str:
    """How errors about the template begin."""
    return f"teacher '{teacher}'" if settings.tokenizer is None else f"synthesis.tokenizer '{settings.tokenizer}'"


def _ended(parameters: SamplingParameters, *ends: str) -> SamplingParameters:
    """With more texts that end a completion."""
    stop = dict.fromkeys((*(end for end in ends if end), *parameters.stop))
    return SamplingParameters(parameters.max_new_tokens, parameters.temperature, parameters.top_p, stop=tuple(stop))
