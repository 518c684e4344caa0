"""Settings of `preferences`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rayk.config.base import Positive, Selection
from rayk.config.sampling import SamplingConfig
from rayk.config.syntheses.answer import AnswerConfig, Scorer
from rayk.config.syntheses.student import StudentSynthesisConfig


class PreferencesConfig(StudentSynthesisConfig):
    """A better and a worse answer to each prompt, for method `preference` (DPO). Filters read the better one, `chosen`,
    as `completion`; the other one is `rejected`."""

    kind: Literal["preferences"] = "preferences"
    """The synthesis' kind."""
    chosen: Annotated[Literal["teacher", "best"], Selection()] = "teacher"
    """`teacher`: the teacher's answer is the better one, the student's the worse one. `best`: of all samples, the one
    with the highest score is the better one, the one with the lowest score the worse one."""
    samples: Positive = 1
    """Number of the teacher's samples per prompt."""
    student_samples: Annotated[int, Field(ge=0)] = 1
    """Number of samples per prompt of the student, with its weights at the start of the round. With `chosen: teacher`,
    samples of teacher and student are paired one by one, and those of the model with fewer samples are used again."""
    student_sampling: SamplingConfig | None = None
    """Sampling of the student's answers. The student reads prompts in the form that section `data` gives them. `null`:
    as the teacher's."""
    scorer: Annotated[Scorer, Selection()] = "answer"
    """The score for `chosen: best`. `answer`: 1 for a right answer, else 0; `mean_logprob`: the mean log-prob under the
    teacher, only with `student_samples: 0`; or your function 'module:name', called as
    `function(prompt, completion, row)`, which returns a number (higher is better)."""
    answer: Annotated[AnswerConfig, Selection()] = Field(default_factory=AnswerConfig)
    """The form of answers, for scorer `answer`."""

    @model_validator(mode="after")
    def _check_pairs(self) -> "PreferencesConfig":
        if self.chosen == "teacher" and not self.student_samples:
            raise ValueError(
                "chosen 'teacher' needs samples of the student, but student_samples is 0; set chosen: best"
            )
        if self.samples + self.student_samples < 2:
            raise ValueError("a pair needs two samples; raise samples or student_samples")
        if self.needs_logprobs and self.student_samples:
            raise ValueError(
                "scorer 'mean_logprob' compares samples of one model, but teacher and student generate; set "
                "student_samples to 0, or another scorer"
            )
        return self

    @property
    def writes_pairs(self) -> bool:
        return True

    @property
    def reads_student(self) -> bool:
        return self.student_samples > 0

    @property
    def reads_truth(self) -> bool:
        return self.chosen == "best" and self.scorer == "answer"

    @property
    def needs_logprobs(self) -> bool:
        return self.chosen == "best" and self.scorer == "mean_logprob"
