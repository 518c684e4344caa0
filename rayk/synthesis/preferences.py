"""Pairs of a better and a worse answer to each prompt, for direct preference optimisation (DPO, Rafailov et al. 2023,
arXiv 2305.18290).

Two ways to make them (`chosen`):

- `teacher`: the teacher's answer is the chosen one, the student's the rejected one. No judge is needed, but a chosen
  answer is then nothing the student would have written, and whatever tells the two writers apart is learned as better,
  their length first of all; the figures say by how much they differ.
- `best`: of all samples, the teacher's and the student's, the one that `scorer` likes best is the chosen one, and the
  one that it likes least the rejected one; of equals the student's, which is nearer to what it would write. A prompt
  whose samples all score the same has no pair. With `student_samples: 0` this is Magpie's preference set (Xu et al.
  2024, arXiv 2406.08464), there by a reward model.

A pair of equal answers teaches nothing and is left out. With `rounds` the student answers anew as it is when each round
begins, and is the reference of that round's training, while the teacher's answers stay those of the first round.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rayk.config import PreferencesConfig, TeacherConfig
from rayk.engines.batching import gather
from rayk.synthesis.base import (
    Candidate,
    PerPromptRecipe,
    Statistic,
    completion_problem,
    completion_text,
    sampling_parameters,
)
from rayk.synthesis.completions import CompletionClient, CompletionRequest
from rayk.synthesis.prompts import Prompt
from rayk.synthesis.scoring import CompletionScorer
from rayk.synthesis.store import StoredCompletion

_TEACHER, _STUDENT = 30, 31  # the stages of a seed


@dataclass(frozen=True)
class _Answer:
    """One sample. `fault`: the check that it does not pass by itself, and why."""

    by: str
    written: StoredCompletion
    text: str
    fault: tuple[str, str] | None
    score: float | None = None


class Preferences(PerPromptRecipe[PreferencesConfig]):
    """See the module."""

    summary = "of two answers to each prompt a better and a worse one: the teacher's and the student's, or by a score"
    paper = "Rafailov et al. 2023, arXiv 2305.18290"

    def __init__(self, settings: PreferencesConfig, prompts: Sequence[Prompt], scribe: CompletionClient):
        super().__init__(settings, prompts, scribe)
        self._sampling = {"teacher": settings.sampling, "student": settings.student_sampling or settings.sampling}
        self._score = CompletionScorer(settings.scorer, settings.answer) if settings.chosen == "best" else None
        self._scores: dict[str, list[float]] = {"teacher": [], "student": []}

    @classmethod
    def check(cls, settings: PreferencesConfig, writer: TeacherConfig) -> None:
        CompletionScorer(settings.scorer, settings.answer)

    @property
    def requests(self) -> int:
        return len(self.prompts) * (self.settings.samples + self.settings.student_samples)

    async def generate_for_prompt(self, place: int, prompt: Prompt) -> list[Candidate]:
        work = [self._ask("teacher", self.scribe, _TEACHER, place, i) for i in range(self.settings.samples)]
        if self.settings.student_samples:
            assert self.round.student is not None
            work += [
                self._ask("student", self.round.student, _STUDENT, place, i)
                for i in range(self.settings.student_samples)
            ]
        answers = await gather(work)
        theirs = answers[: self.settings.samples]
        if self._score is not None:
            return [self._best_and_worst(place, prompt, answers[self.settings.samples :] + theirs)]
        own = answers[self.settings.samples :]
        pairs = range(max(len(theirs), len(own)))
        return [self._pair(place, prompt, theirs[i % len(theirs)], own[i % len(own)]) for i in pairs]

    async def _ask(self, by: str, scribe: CompletionClient, stage: int, place: int, sample: int) -> _Answer:
        sampling = self._sampling[by]
        seed = self.scribe.seed(stage, place, sample)
        written = await scribe.ask(CompletionRequest(self.prompts[place].text, seed, sampling_parameters(sampling)))
        text = completion_text(written, sampling.stop)
        fault = completion_problem(written, text, by)
        if fault or self._score is None:
            return _Answer(by, written, text, fault)
        score = self._score(self.prompts[place], written, text)
        self._scores[by].append(score)
        return _Answer(by, written, text, None, score)

    def _best_and_worst(self, place: int, prompt: Prompt, answers: Sequence[_Answer]) -> Candidate:
        sound = [each for each in answers if not each.fault]
        if len(sound) < 2:
            first, second = sorted(answers, key=lambda each: each.fault is not None)[:2]
            return self._pair(place, prompt, first, second)
        best, worst = (pick(sound, key=lambda each: each.score or 0.0) for pick in (max, min))
        if best.score == worst.score:
            # Not one answer beside itself.
            return self._pair(place, prompt, sound[0], sound[1], tie=f"all {len(sound)} answers score {best.score:g}")
        return self._pair(place, prompt, best, worst)

    def _pair(self, place: int, prompt: Prompt, chosen: _Answer, other: _Answer, tie: str = "") -> Candidate:
        fields: dict[str, Any] = {
            "chosen_from": chosen.by, "rejected_from": other.by, "rejected_tokens": other.written.tokens,
            "rejected_finish_reason": other.written.finish_reason,
        }  # fmt: skip
        if chosen.score is not None:
            fields |= {"chosen_score": chosen.score, "rejected_score": other.score}
        written = (chosen.written, other.written)
        candidate = Candidate(prompt.text, chosen.text, place, written, fields, worse=other.text)
        if fault := chosen.fault or other.fault:
            return candidate.rejected(*fault)
        if chosen.text.strip() == other.text.strip():
            return candidate.rejected("identical", "both answers are the same")
        return candidate.rejected("tie", tie) if tie else candidate

    def figures(self, candidates: Sequence[Candidate]) -> list[Statistic]:
        kept = [each for each in candidates if not each.rejected_by]
        if not kept:
            return []
        lengths = [(len(each.completion), len(each.worse or "")) for each in kept]
        figures = [
            Statistic("chosen answer, characters", fmean(chosen for chosen, _ in lengths), share=False),
            Statistic("rejected answer, characters", fmean(other for _, other in lengths), share=False),
            Statistic(
                "pairs whose chosen answer is the longer one", fmean(chosen > other for chosen, other in lengths)
            ),
            Statistic("rejected answers cut off", fmean(each.written[1].finish_reason == "length" for each in kept)),
        ]
        if self.settings.chosen == "best" and self.settings.student_samples:
            by_teacher = fmean(each.fields["chosen_from"] == "teacher" for each in kept)
            figures.append(Statistic("chosen answers by the teacher", by_teacher))
        if self.settings.reads_truth:
            figures += [Statistic(f"{by}'s right answers", fmean(each)) for by, each in self._scores.items() if each]
        return figures
