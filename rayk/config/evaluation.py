"""Measurements on held-out rows."""

from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import Field, model_validator

from rayk.config.base import FUNCTION_PATTERN, AnswerChoices, AnswerPattern, AnswerType, Positive, Settings
from rayk.config.support import TopK

_BEST = {
    **dict.fromkeys(("loss", "forward_kl", "reverse_kl"), "min"),
    **dict.fromkeys(("agreement", "accuracy", "preference_margin", "preference_accuracy"), "max"),
    **dict.fromkeys(("rouge_l", "exact_match", "f1"), "max"),
}
"""Whether the lowest or the highest value of a metric is the best one."""
_DIVERGENCE_METRICS = ("forward_kl", "reverse_kl", "agreement", "student_mass")
_PAIR_METRICS = ("preference_margin", "preference_accuracy")
_ANSWER_METRICS = ("answer_tokens", "stopped")

Metric = Annotated[str, Field(pattern=rf"^(rouge_l|exact_match|f1|{FUNCTION_PATTERN[1:-1]})$")]


class GenerationConfig(Settings):
    """Generation of the student's answers to the evaluation prompts."""

    max_new_tokens: Positive = 128
    """Longest answer in tokens; longer ones are cut."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Sampling temperature; 0 is greedy decoding."""
    rows: Positive | None = None
    """Number of evaluation rows to answer, from the beginning; `null`: all."""
    samples: Positive = 1
    """Number of answers to each row, with different seeds; metrics are means over all of them. Needs a temperature
    above 0. MiniLLM reports ROUGE-L over 5 samples at temperature 1."""

    @model_validator(mode="after")
    def _check_samples(self) -> "GenerationConfig":
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("'samples' is above 1, but at temperature 0 all answers are the same; set a temperature")
        return self


class KeepBestConfig(Settings):
    """The metric that chooses the best of a run's evaluations."""

    metric: str = "loss"
    """A metric of the evaluations: `loss`; with a teacher `forward_kl`, `reverse_kl`, `agreement`; with pairs
    `preference_accuracy`, `preference_margin`; with generated answers `accuracy` and the names in `metrics`. Metrics of
    answers are then measured at every evaluation."""
    mode: Literal["min", "max"] | None = None
    """Whether the lowest or the highest value is the best; `null`: as the metric demands (needed for your own
    functions)."""

    @property
    def is_lower_better(self) -> bool:
        return (self.mode or _BEST[self.metric]) == "min"

    def check(self, measured: Collection[str]) -> None:
        """Check that the metric will be measured, and that its best value is defined.

        Raises:
            ValueError: it will not be, or is not.
        """
        if self.metric not in measured:
            raise ValueError(
                f"evaluation.keep_best.metric '{self.metric}' is not measured in this run; choose one of "
                f"{', '.join(measured)}"
            )
        if self.mode is None and self.metric not in _BEST:
            raise ValueError(f"evaluation.keep_best.mode is missing for '{self.metric}'; set it to min or max")


class EvaluationConfig(Settings):
    """Measurements on held-out rows: the loss, the divergence from the teacher, and the quality of answers."""

    every_steps: Positive | None = None
    """Number of steps between two measurements of loss and divergences; `null`: only at the end."""
    before_training: bool = True
    """Also measure the student before its first update."""
    keep_best: KeepBestConfig | None = None
    """Keep the checkpoint of the best evaluation, whatever `training.keep_checkpoints` is, and save `model/` from it;
    `null`: the model of the last step is saved."""
    patience: Positive | None = None
    """With `keep_best`: end the run after so many evaluations in a row that are not better than the best one; `null`:
    train to the last step."""
    support: TopK = TopK()
    """The part of the teacher's distribution that the divergences are computed on."""
    generation: GenerationConfig | None = None
    """Generate answers to the evaluation prompts and score them; `null`: only losses and divergences are measured."""
    answer_field: str | None = None
    """The row's field with the right answer, or with a list of right answers (references); `null`: the completion. An
    answer that equals any of them is correct."""
    answer_pattern: AnswerPattern | None = None
    """A regular expression with one group that finds the answer, such as '#### (.+)', in the row's text and in the
    student's; the last match counts. `null`: the whole texts are searched."""
    answer_type: Literal["text", "open"] | AnswerType | None = None
    """The form of an answer in the text that `answer_pattern` finds. `text`: all of it, equal after normalizing white
    space. `open`: a long text that can be worded in many ways; `rouge_l` is measured instead of `accuracy`. `null`:
    `open` if there is no pattern and the right answers have more than 20 words on average, else `text`. `number`:
    "42.0" equals "42", "1,000" equals "1000" and "$5" equals "5"; `choice`: one of the letters `answer_choices`;
    `yes_no`; `date`; `free`: the text up to the end of its line, ignoring case. Without a pattern an answer follows
    "the answer is" or `-->`, else it is the last one of its type."""
    answer_choices: AnswerChoices = "ABCDE"
    """The letters of type `choice`."""
    metrics: list[Metric] = Field(default_factory=list)
    """More metrics of the generated answers; needs `generation`. `rouge_l`: ROUGE-L F (as rouge-score without
    stemming) between the generated and the right answer; `exact_match` and `f1`: SQuAD's; with several references, the
    highest value. Or your own function 'module:name', called as
    `metric(completion: str, row: Mapping[str, Any]) -> float` with the answer's text and the row's fields. The mean
    over the answered rows is reported under the function's name."""
    samples: Annotated[int, Field(ge=0)] = 8
    """Number of answers shown in the report."""
    demonstration_draws: Positive = 1
    """With method `in_context`: number of times that each row is answered, each time with another random draw of
    demonstrations; the most frequent answer counts."""

    @property
    def answers_every_time(self) -> bool:
        """Return whether prompts are answered at every evaluation; otherwise only before and after training."""
        return self.keep_best is not None and self.keep_best.metric in self.answer_metrics

    @property
    def answer_metrics(self) -> tuple[str, ...]:
        """The names of the metrics of generated or chosen answers."""
        accuracy = () if self.answer_type == "open" else ("accuracy",)
        return (*accuracy, *_ANSWER_METRICS, *(path.rpartition(":")[2] for path in self.scored_metrics))

    @property
    def scored_metrics(self) -> tuple[str, ...]:
        """The values of `metrics`, with `rouge_l` for answers of type `open`."""
        missing = self.answer_type == "open" and "rouge_l" not in self.metrics
        return (*(["rouge_l"] if missing else []), *self.metrics)

    def measured_metrics(self, *, teacher: bool, pairs: bool, options: bool) -> list[str]:
        """Return the names of the student's metrics that can differ between evaluations.

        Args:
            teacher: a teacher returns signals for the evaluation rows.
            pairs: rows are preference pairs.
            options: rows may be answered by one of their options.
        """
        names = ["loss", *(_DIVERGENCE_METRICS if teacher else ()), *(_PAIR_METRICS if pairs else ())]
        if self.generation is not None:
            return [*names, *self.answer_metrics]
        return [*names, "accuracy"] if options else names

    @model_validator(mode="after")
    def _check_patience(self) -> "EvaluationConfig":
        if self.patience is not None and self.keep_best is None:
            raise ValueError(
                "'patience' waits for a better evaluation; set 'keep_best' to the metric that decides, too"
            )
        return self

    @model_validator(mode="after")
    def _check_metrics(self) -> "EvaluationConfig":
        if self.metrics and self.generation is None:
            raise ValueError("'metrics' are computed on generated answers; set 'generation' too, or leave them out")
        if self.answer_type == "open" and self.answer_pattern is not None:
            raise ValueError(
                "answer_type 'open' compares whole texts, so 'answer_pattern' has no effect; leave one of them out"
            )
        return self
