"""The teacher's answers to the rows' prompts: sequence-level distillation (SeqKD, Kim & Rush 2016, arXiv 1606.07947).

The student is then trained on the teacher's text, by any method. With several samples of a prompt all of them are
learned from, or the best: by the teacher's own mean log-prob, by the truth, or by a function of yours.
"""

from collections.abc import Sequence
from itertools import groupby

from rayk.config import ResponsesConfig, TeacherConfig
from rayk.synthesis.base import Candidate, PerPromptRecipe, completion_problem, completion_text, sampling_parameters
from rayk.synthesis.completions import CompletionClient, CompletionRequest
from rayk.synthesis.prompts import Prompt
from rayk.synthesis.scoring import CompletionScorer
from rayk.synthesis.store import StoredCompletion

_SAMPLE = 0  # the stage of a seed


class Responses(PerPromptRecipe[ResponsesConfig]):
    """See the module."""

    summary = "the teacher's answers to the rows' prompts, all of them or the best of several"
    paper = "Kim & Rush 2016, arXiv 1606.07947"

    def __init__(self, settings: ResponsesConfig, prompts: Sequence[Prompt], scribe: CompletionClient):
        super().__init__(settings, prompts, scribe)
        self._parameters = sampling_parameters(settings.sampling)
        self._score = CompletionScorer(settings.scorer, settings.answer)

    @classmethod
    def check(cls, settings: ResponsesConfig, writer: TeacherConfig) -> None:
        CompletionScorer(settings.scorer, settings.answer)

    @property
    def requests(self) -> int:
        return len(self.prompts) * self.settings.samples

    async def generate_for_prompt(self, place: int, prompt: Prompt) -> list[Candidate]:
        seeds = [self.scribe.seed(_SAMPLE, place, sample) for sample in range(self.settings.samples)]
        answers = await self.scribe.write(CompletionRequest(prompt.text, seed, self._parameters) for seed in seeds)
        return [self._candidate(place, prompt, written) for written in answers]

    def _candidate(self, place: int, prompt: Prompt, written: StoredCompletion) -> Candidate:
        text = completion_text(written, self.settings.sampling.stop)
        candidate = Candidate(prompt.text, text, place, (written,))
        if fault := completion_problem(written, text):
            return candidate.rejected(*fault)
        if self.settings.keep == "all":
            return candidate
        scored = Candidate(prompt.text, text, place, (written,), {"score": self._score(prompt, written, text)})
        if self.settings.scorer == "answer" and not scored.fields["score"]:
            return scored.rejected("wrong_answer", f"does not end in {prompt.truth}")
        return scored

    def choose(self, kept: list[Candidate]) -> list[Candidate]:
        if self.settings.keep == "all":
            return kept
        chosen = []
        for _, group in groupby(kept, key=lambda candidate: candidate.origin):
            samples = list(group)
            best = max(samples, key=lambda candidate: candidate.fields["score"])
            chosen += [
                each if each is best else each.rejected("not_best", "another answer scored as high or higher")
                for each in samples
            ]
        return chosen
