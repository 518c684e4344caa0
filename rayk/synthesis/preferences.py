"""Pairs of a better and a worse completion of each prompt, for direct preference optimization (DPO, Rafailov et al.
2023, arXiv 2305.18290).

Two ways to make them (`chosen`):

- `teacher`: the teacher's completion is chosen, the student's is rejected. This needs no score. But the student would
  not have generated the chosen completion, and it learns to prefer whatever distinguishes the teacher's completions
  from its own, first of all their length; the statistics contain both lengths.
- `best`: of all samples, the teacher's and the student's, the one with the highest `scorer` value is chosen and the one
  with the lowest is rejected. Among equal scores the student's sample is taken, because it is closer to the student's
  distribution. A prompt whose samples all have the same score gives no pair. With `student_samples: 0` this is Magpie's
  preference set (Xu et al. 2024, arXiv 2406.08464), where the score comes from a reward model.

A pair of equal completions teaches nothing and is rejected. With `rounds` the student generates new completions when
each round begins, and is the reference of that round's training; the teacher's completions are those of the first
round.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from types import MappingProxyType
from typing import Any

from rayk.config import PreferencesConfig, TeacherConfig
from rayk.engines.batching import gather
from rayk.synthesis.base import (
    Candidate,
    Recipe,
    Statistic,
    completion_problem,
    completion_text,
    sampling_parameters,
)
from rayk.synthesis.completions import CompletionClient
from rayk.synthesis.prompts import Prompt
from rayk.synthesis.scoring import CompletionScorer
from rayk.synthesis.store import StoredCompletion

_TEACHER, _STUDENT = 30, 31  # the first number of a seed's position


@dataclass(frozen=True)
class _Sample:
    """One completion by `model`, 'teacher' or 'student'.

    Attributes:
        problem: the check that the completion fails, and the reason; None if it can be used.
    """

    model: str
    response: StoredCompletion
    text: str
    problem: tuple[str, str] | None
    score: float | None = None


class Preferences(Recipe[PreferencesConfig]):
    """Recipe `preferences`; see the module."""

    summary = "a better and a worse completion of each prompt: the teacher's and the student's, or chosen by a score"
    paper = "Rafailov et al. 2023, arXiv 2305.18290"
    example_fields = MappingProxyType({
        "chosen_from": "teacher", "rejected_from": "student", "rejected_tokens": 2, "rejected_finish_reason": "stop",
        "chosen_score": 1.0, "rejected_score": 0.0,
    })  # fmt: skip

    def __init__(self, settings: PreferencesConfig, prompts: Sequence[Prompt], client: CompletionClient):
        super().__init__(settings, prompts, client)
        self._sampling = {"teacher": settings.sampling, "student": settings.student_sampling or settings.sampling}
        self._score = CompletionScorer(settings.scorer, settings.answer) if settings.chosen == "best" else None
        self._scores: dict[str, list[float]] = {"teacher": [], "student": []}

    @classmethod
    def check(cls, settings: PreferencesConfig, teacher: TeacherConfig) -> None:
        CompletionScorer(settings.scorer, settings.answer)

    @property
    def max_requests(self) -> int:
        return len(self.prompts) * (self.settings.samples + self.settings.student_samples)

    async def generate(self, index: int, prompt: Prompt) -> list[Candidate]:
        num_teacher, num_student = self.settings.samples, self.settings.student_samples
        work = [self._sample("teacher", self.client, _TEACHER, index, i) for i in range(num_teacher)]
        if num_student:
            assert self.round.student is not None
            work += [self._sample("student", self.round.student, _STUDENT, index, i) for i in range(num_student)]
        samples = await gather(work)
        by_teacher, by_student = samples[:num_teacher], samples[num_teacher:]
        if self._score is not None:
            return [self._best_and_worst(index, prompt, by_student + by_teacher)]
        return [
            self._pair(index, prompt, by_teacher[i % num_teacher], by_student[i % num_student])
            for i in range(max(num_teacher, num_student))
        ]

    async def _sample(self, model: str, client: CompletionClient, stage: int, index: int, number: int) -> _Sample:
        sampling = self._sampling[model]
        prompt, seed = self.prompts[index], self.client.seed(stage, index, number)
        response = await client.complete(prompt.request(seed, sampling_parameters(sampling)))
        text = completion_text(response, sampling.stop)
        problem = completion_problem(response, text, model)
        if problem or self._score is None:
            return _Sample(model, response, text, problem)
        score = self._score(prompt, response, text)
        self._scores[model].append(score)
        return _Sample(model, response, text, None, score)

    def _best_and_worst(self, index: int, prompt: Prompt, samples: Sequence[_Sample]) -> Candidate:
        usable = [sample for sample in samples if not sample.problem]
        if len(usable) < 2:
            first, second = sorted(samples, key=lambda sample: sample.problem is not None)[:2]
            return self._pair(index, prompt, first, second)
        best, worst = (pick(usable, key=lambda sample: sample.score or 0.0) for pick in (max, min))
        if best.score == worst.score:
            # `best` and `worst` are the same sample here, but a pair needs two.
            tie = f"all {len(usable)} completions score {best.score:g}"
            return self._pair(index, prompt, usable[0], usable[1], tie=tie)
        return self._pair(index, prompt, best, worst)

    def _pair(self, index: int, prompt: Prompt, chosen: _Sample, other: _Sample, tie: str = "") -> Candidate:
        fields: dict[str, Any] = {
            "chosen_from": chosen.model, "rejected_from": other.model, "rejected_tokens": other.response.tokens,
            "rejected_finish_reason": other.response.finish_reason,
        }  # fmt: skip
        if chosen.score is not None:
            fields |= {"chosen_score": chosen.score, "rejected_score": other.score}
        responses = (chosen.response, other.response)
        candidate = Candidate(prompt.text, chosen.text, index, responses, fields, worse=other.text)
        if problem := chosen.problem or other.problem:
            return candidate.reject(*problem)
        if chosen.text.strip() == other.text.strip():
            return candidate.reject("identical", "both completions are the same")
        return candidate.reject("tie", tie) if tie else candidate

    def statistics(self, candidates: Sequence[Candidate]) -> list[Statistic]:
        kept = [each for each in candidates if not each.rejected_by]
        if not kept:
            return []
        lengths = [(len(each.completion), len(each.worse or "")) for each in kept]
        longer = fmean(chosen > other for chosen, other in lengths)
        truncated = fmean(each.responses[1].finish_reason == "length" for each in kept)
        statistics = [
            Statistic("chosen answer, characters", fmean(chosen for chosen, _ in lengths), share=False),
            Statistic("rejected answer, characters", fmean(other for _, other in lengths), share=False),
            Statistic("pairs whose chosen answer is the longer one", longer),
            Statistic("rejected answers cut off", truncated),
        ]
        if self.settings.chosen == "best" and self.settings.student_samples:
            by_teacher = fmean(each.fields["chosen_from"] == "teacher" for each in kept)
            statistics.append(Statistic("chosen answers by the teacher", by_teacher))
        if self.settings.reads_truth:
            scores = self._scores.items()
            statistics += [Statistic(f"{model}'s right answers", fmean(each)) for model, each in scores if each]
        return statistics
