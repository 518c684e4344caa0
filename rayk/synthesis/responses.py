"""The teacher's answers to the rows' prompts: sequence-level distillation (SeqKD, Kim & Rush 2016, arXiv 1606.07947).

The student is then trained on the teacher's text, by any method. With several samples of a prompt all of them are
learned from, or the best: by the teacher's own mean log-prob, by the truth, or by a function of yours.
"""

import math
from collections.abc import Sequence
from itertools import groupby

from rayk.config import ResponsesConfig, TeacherConfig
from rayk.errors import InputError
from rayk.synthesis.base import Candidate, Recipe, fault_of, parameters_of, text_of
from rayk.synthesis.prompts import Prompt, is_right
from rayk.synthesis.scribe import Request, Scribe
from rayk.synthesis.store import Written
from rayk.text.answers import answer_in
from rayk.text.functions import load_function

_SAMPLE = 0  # the stage of a seed


class Responses(Recipe[ResponsesConfig]):
    """See the module."""

    summary = "the teacher's answers to the rows' prompts, all of them or the best of several"
    paper = "Kim & Rush 2016, arXiv 1606.07947"

    def __init__(self, settings: ResponsesConfig, prompts: Sequence[Prompt], scribe: Scribe):
        super().__init__(settings, prompts, scribe)
        self._parameters = parameters_of(settings.sampling)
        self._own_score = load_function(settings.scorer, "synthesis.scorer") if ":" in settings.scorer else None

    @classmethod
    def check(cls, settings: ResponsesConfig, writer: TeacherConfig) -> None:
        if ":" in settings.scorer:
            load_function(settings.scorer, "synthesis.scorer")

    @property
    def requests(self) -> int:
        return len(self.prompts) * self.settings.samples

    async def write_for(self, place: int, prompt: Prompt) -> list[Candidate]:
        seeds = [self.scribe.seed(_SAMPLE, place, sample) for sample in range(self.settings.samples)]
        answers = await self.scribe.write(Request(prompt.text, seed, self._parameters) for seed in seeds)
        return [self._candidate(place, prompt, written) for written in answers]

    def _candidate(self, place: int, prompt: Prompt, written: Written) -> Candidate:
        text = text_of(written, self.settings.sampling.stop)
        candidate = Candidate(prompt.text, text, place, (written,))
        if fault := fault_of(written, text):
            return candidate.rejected(*fault)
        if self.settings.keep == "all":
            return candidate
        scored = Candidate(prompt.text, text, place, (written,), {"score": self._score(prompt, candidate)})
        if self.settings.scorer == "answer" and not scored.fields["score"]:
            return scored.rejected("wrong_answer", f"does not end in {prompt.truth}")
        return scored

    def _score(self, prompt: Prompt, candidate: Candidate) -> float:
        (written,) = candidate.written
        if self.settings.scorer == "mean_logprob":
            if written.mean_logprob is None:
                raise InputError(
                    "synthesis.scorer 'mean_logprob': the teacher tells no log-probs of what it writes; choose another "
                    "scorer."
                )
            return round(written.mean_logprob, 4)
        if self.settings.scorer == "answer":
            assert prompt.truth is not None
            answer = self.settings.answer
            found = answer_in(candidate.completion, answer.type, choices=answer.choices)
            return float(is_right(found, prompt.truth, answer))
        assert self._own_score is not None
        try:
            score = float(self._own_score(prompt.text, candidate.completion, dict(prompt.fields)))
        except Exception as error:  # a function of the user's fails in ways of its own
            raise InputError(
                f"synthesis.scorer '{self.settings.scorer}' failed with {type(error).__name__} ({error}) for "
                f"{prompt.where}."
            ) from error
        if math.isnan(score):
            raise InputError(f"synthesis.scorer '{self.settings.scorer}' returned NaN for {prompt.where}.")
        return score

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
