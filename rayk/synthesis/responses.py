"""Teacher completions of the rows' prompts: sequence-level distillation (SeqKD, Kim & Rush 2016, arXiv 1606.07947).

The student is then trained on the teacher's text, by any method. Of several samples per prompt all are kept, or the
best one: by the teacher's own mean log-prob, by comparison with the right answer, or by a user's function.
"""

from collections.abc import Sequence
from itertools import groupby
from types import MappingProxyType

from rayk.config import ResponsesConfig, TeacherConfig
from rayk.synthesis.base import Candidate, Recipe, completion_problem, completion_text, sampling_parameters
from rayk.synthesis.completions import CompletionClient
from rayk.synthesis.prompts import Prompt
from rayk.synthesis.scoring import CompletionScorer
from rayk.synthesis.store import StoredCompletion

_SAMPLE = 0  # the first number of a seed's position


class Responses(Recipe[ResponsesConfig]):
    """Recipe `responses`; see the module."""

    summary = "the teacher's completions of the rows' prompts, all of them or the best of several"
    paper = "Kim & Rush 2016, arXiv 1606.07947"
    example_fields = MappingProxyType({"score": 1.0})

    def __init__(self, settings: ResponsesConfig, prompts: Sequence[Prompt], client: CompletionClient):
        super().__init__(settings, prompts, client)
        self._parameters = sampling_parameters(settings.sampling)
        self._score = CompletionScorer(settings.scorer, settings.answer)

    @classmethod
    def check(cls, settings: ResponsesConfig, teacher: TeacherConfig) -> None:
        CompletionScorer(settings.scorer, settings.answer)

    @property
    def max_requests(self) -> int:
        return len(self.prompts) * self.settings.samples

    async def generate(self, index: int, prompt: Prompt) -> list[Candidate]:
        seeds = [self.client.seed(_SAMPLE, index, sample) for sample in range(self.settings.samples)]
        requests = (prompt.request(seed, self._parameters) for seed in seeds)
        return [self._candidate(index, prompt, response) for response in await self.client.complete_all(requests)]

    def _candidate(self, index: int, prompt: Prompt, response: StoredCompletion) -> Candidate:
        text = completion_text(response, self.settings.sampling.stop)
        candidate = Candidate(prompt.text, text, index, (response,))
        if problem := completion_problem(response, text):
            return candidate.reject(*problem)
        if self.settings.keep == "all":
            return candidate
        score = self._score(prompt, response, text)
        scored = Candidate(prompt.text, text, index, (response,), {"score": score})
        if self.settings.scorer == "answer" and not score:
            return scored.reject("wrong_answer", f"does not end in {prompt.truth}")
        return scored

    def select(self, accepted: list[Candidate]) -> list[Candidate]:
        if self.settings.keep == "all":
            return accepted
        selected = []
        for _, group in groupby(accepted, key=lambda candidate: candidate.prompt_index):
            samples = list(group)
            best = max(samples, key=lambda candidate: candidate.fields["score"])
            selected += [
                sample if sample is best else sample.reject("not_best", "another completion scores as high or higher")
                for sample in samples
            ]
        return selected
