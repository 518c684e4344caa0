"""Rationales by which the teacher came to the right answer: Fine-tune-CoT (Ho et al. 2022, arXiv 2212.10071).

Two calls a rationale (zero-shot CoT): "Q: … A: Let's think step by step." brings the rationale; with it appended,
"Therefore, the answer is" brings the answer, greedily. A rationale is kept if its answer is right. D of them a
question, sampled (diverse reasoning), let the student see several ways. It learns `<question> ###` → `<rationale> -->
<answer>` and its EOS, where the authors' code for OpenAI writes END.
"""

from collections.abc import Sequence

from rayk.config import ChainOfThoughtConfig
from rayk.engines.base import SamplingParameters
from rayk.engines.batching import gather
from rayk.synthesis.base import (
    MISSING_RESPONSE,
    Candidate,
    PerPromptRecipe,
    Statistic,
    completion_problem,
    completion_text,
    missing_response,
    sampling_parameters,
)
from rayk.synthesis.completions import CompletionClient, CompletionRequest
from rayk.synthesis.prompts import Prompt, is_right
from rayk.synthesis.store import StoredCompletion
from rayk.text.answers import find_answer

_RATIONALE, _ANSWER = 1, 2  # the stages of a seed


class ChainOfThought(PerPromptRecipe[ChainOfThoughtConfig]):
    """See the module."""

    summary = "the teacher's rationales that end in the right answer, several a question"
    paper = "Ho et al. 2022, arXiv 2212.10071"

    def __init__(self, settings: ChainOfThoughtConfig, prompts: Sequence[Prompt], scribe: CompletionClient):
        super().__init__(settings, prompts, scribe)
        self._rationale = sampling_parameters(settings.sampling)
        self._answer = SamplingParameters(settings.answer_tokens, 0.0, stop=tuple(settings.sampling.stop))

    @property
    def requests(self) -> int:
        return 2 * len(self.prompts) * self.settings.rationales

    async def generate_for_prompt(self, place: int, prompt: Prompt) -> list[Candidate]:
        return await gather(self._draw(place, prompt, draw) for draw in range(self.settings.rationales))

    async def _draw(self, place: int, prompt: Prompt, draw: int) -> Candidate:
        asked = self.settings.rationale_template.format(question=prompt.text)
        written = await self.scribe.ask(CompletionRequest(asked, self.scribe.seed(_RATIONALE, place, draw), self._rationale))
        rationale = completion_text(written, self.settings.sampling.stop).strip()
        if fault := completion_problem(written, rationale):
            self.scribe.total -= 1  # it is not asked for its answer
            return Candidate(self._question(prompt), rationale, place, (written,)).rejected(*fault)
        second = self.settings.answer_template.format(asked=asked, rationale=rationale)
        answer = await self.scribe.ask(CompletionRequest(second, self.scribe.seed(_ANSWER, place, draw), self._answer))
        return self._candidate(place, prompt, rationale, written, answer)

    def _candidate(self, place: int, prompt: Prompt, rationale: str, *written: StoredCompletion) -> Candidate:
        settings = self.settings.answer
        said = completion_text(written[-1], self.settings.sampling.stop)
        found = find_answer(said, settings.type, choices=settings.choices, continues=True)
        right = None if prompt.truth is None else is_right(found, prompt.truth, settings)
        # A right answer is learned as the row writes it.
        answer = prompt.truth if right else found
        fields = {"rationale": rationale, "teacher_answer": found, "correct": right}
        candidate = Candidate(self._question(prompt), self._target(rationale, answer), place, written, fields)
        if lack := missing_response(written[-1]):
            return candidate.rejected(*lack)
        if found is None:
            return candidate.rejected("no_answer", f"no {settings.type} in {said[:60]!r}")
        if right is False:
            return candidate.rejected("wrong_answer", f"{found}, where {prompt.truth} is right")
        return candidate

    def _question(self, prompt: Prompt) -> str:
        return f"{prompt.text} ###" if self.settings.student_format == "delimiters" else prompt.text

    def _target(self, rationale: str, answer: str | None) -> str:
        if self.settings.student_format == "delimiters":
            return f" {rationale} --> {answer}"
        return f"{rationale}\nTherefore, the answer is {answer}."

    def figures(self, candidates: Sequence[Candidate]) -> list[Statistic]:
        answered = [each for each in candidates if each.rejected_by not in MISSING_RESPONSE]
        kept = [each for each in candidates if not each.rejected_by]
        if not answered:
            return []
        figures = [Statistic("rationales kept", len(kept) / len(answered))]
        if self.settings.reads_truth:
            right = sum(bool(each.fields.get("correct")) for each in answered)
            figures.insert(0, Statistic("teacher's accuracy", right / len(answered)))
        distinct = {(each.origin, each.fields["rationale"]) for each in kept}
        questions = len({origin for origin, _ in distinct})
        figures.append(Statistic("questions with a rationale", questions / len(self.prompts)))
        if questions:
            figures.append(Statistic("different rationales a question", len(distinct) / questions, share=False))
        return figures
