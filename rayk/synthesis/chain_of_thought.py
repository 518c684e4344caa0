"""Rationales that lead the teacher to the right answer: Fine-tune-CoT (Ho et al. 2022, arXiv 2212.10071).

Each rationale takes two requests (zero-shot CoT): "Q: … A: Let's think step by step." returns the rationale; with the
rationale appended, "Therefore, the answer is" returns the answer, greedily. A rationale is kept if its answer is right.
With D sampled rationales per question (diverse reasoning) the student sees several solutions. The student learns
`<question> ###` → `<rationale> --> <answer>` and EOS; the authors' code for OpenAI has END in its place. In a
conversation, the last message is the question.
"""

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

from rayk.config import ChainOfThoughtConfig
from rayk.engines.base import SamplingParameters
from rayk.engines.batching import gather
from rayk.synthesis.base import (
    MISSING_RESPONSE,
    Candidate,
    Recipe,
    Statistic,
    completion_problem,
    completion_text,
    missing_response,
    sampling_parameters,
)
from rayk.synthesis.completions import CompletionClient
from rayk.synthesis.prompts import Prompt, is_right
from rayk.synthesis.store import StoredCompletion
from rayk.text.answers import find_answer

_RATIONALE, _ANSWER = 1, 2  # the first number of a seed's position


class ChainOfThought(Recipe[ChainOfThoughtConfig]):
    """Recipe `chain_of_thought`; see the module."""

    summary = "the teacher's rationales that end in the right answer, several per question"
    paper = "Ho et al. 2022, arXiv 2212.10071"
    example_fields = MappingProxyType({"rationale": "This is a rationale.", "teacher_answer": "4", "correct": True})

    def __init__(self, settings: ChainOfThoughtConfig, prompts: Sequence[Prompt], client: CompletionClient):
        super().__init__(settings, prompts, client)
        self._rationale_parameters = sampling_parameters(settings.sampling)
        self._answer_parameters = SamplingParameters(settings.answer_tokens, 0.0, stop=tuple(settings.sampling.stop))

    @property
    def max_requests(self) -> int:
        return 2 * len(self.prompts) * self.settings.rationales

    async def generate(self, index: int, prompt: Prompt) -> list[Candidate]:
        return await gather(self._sample(index, prompt, sample) for sample in range(self.settings.rationales))

    async def _sample(self, index: int, prompt: Prompt, sample: int) -> Candidate:
        first = self.settings.rationale_template.format(question=prompt.question)
        seed = self.client.seed(_RATIONALE, index, sample)
        response = await self.client.complete(prompt.with_question(first).request(seed, self._rationale_parameters))
        rationale = completion_text(response, self.settings.sampling.stop).strip()
        if problem := completion_problem(response, rationale):
            self.client.total -= 1  # no answer is requested
            return self._row(prompt, rationale, index, (response,)).reject(*problem)
        second = self.settings.answer_template.format(asked=first, rationale=rationale)
        seed = self.client.seed(_ANSWER, index, sample)
        answer = await self.client.complete(prompt.with_question(second).request(seed, self._answer_parameters))
        return self._candidate(index, prompt, rationale, response, answer)

    def _candidate(self, index: int, prompt: Prompt, rationale: str, *responses: StoredCompletion) -> Candidate:
        settings = self.settings.answer
        text = completion_text(responses[-1], self.settings.sampling.stop)
        found = find_answer(text, settings.type, choices=settings.choices, continues=True)
        right = None if prompt.truth is None else is_right(found, prompt.truth, settings)
        # The student learns a right answer in the row's notation.
        answer = prompt.truth if right else found
        fields = {"rationale": rationale, "teacher_answer": found, "correct": right}
        completion = self._student_completion(rationale, answer)
        candidate = self._row(prompt, completion, index, responses, fields)
        if missing := missing_response(responses[-1]):
            return candidate.reject(*missing)
        if found is None:
            return candidate.reject("no_answer", f"no {settings.type} in {text[:60]!r}")
        if right is False:
            return candidate.reject("wrong_answer", f"{found} instead of {prompt.truth}")
        return candidate

    def _row(
        self, prompt: Prompt, completion: str, index: int, responses: tuple[StoredCompletion, ...],
        fields: dict[str, Any] | None = None,
    ) -> Candidate:  # fmt: skip
        """Return a candidate whose prompt is the student's."""
        if self.settings.student_format == "delimiters":
            prompt = prompt.with_question(f"{prompt.question} ###")
        return Candidate(prompt.text, completion, index, responses, fields or {}, messages=prompt.messages)

    def _student_completion(self, rationale: str, answer: str | None) -> str:
        if self.settings.student_format == "delimiters":
            return f" {rationale} --> {answer}"
        return f"{rationale}\nTherefore, the answer is {answer}."

    def statistics(self, candidates: Sequence[Candidate]) -> list[Statistic]:
        answered = [each for each in candidates if each.rejected_by not in MISSING_RESPONSE]
        kept = [each for each in candidates if not each.rejected_by]
        if not answered:
            return []
        statistics = [Statistic("rationales kept", len(kept) / len(answered))]
        if self.settings.reads_truth:
            right = sum(bool(each.fields.get("correct")) for each in answered)
            statistics.insert(0, Statistic("teacher's accuracy", right / len(answered)))
        distinct = {(each.prompt_index, each.fields["rationale"]) for each in kept}
        questions = len({index for index, _ in distinct})
        statistics.append(Statistic("questions with a rationale", questions / len(self.prompts)))
        if questions:
            statistics.append(Statistic("different rationales a question", len(distinct) / questions, share=False))
        return statistics
