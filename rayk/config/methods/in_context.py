"""Settings of `in_context`."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from rayk.config.base import Share
from rayk.config.data import RowFormat
from rayk.config.demonstrations import ROW_FORMAT, DemonstrationsConfig
from rayk.config.methods.teacher import TeacherMethodConfig
from rayk.config.retriever import RetrieverConfig
from rayk.config.sections import Run
from rayk.config.support import Layers, Logprob, Requested, Support
from rayk.config.teachers import check_teacher_name


class InContextConfig(TeacherMethodConfig):
    """The student learns to use demonstrations in its context as the teacher does (ICL distillation)."""

    row_format: ClassVar[RowFormat | None] = ROW_FORMAT

    kind: Literal["in_context"] = "in_context"
    """The method's kind."""
    demonstrations: DemonstrationsConfig = Field(default_factory=DemonstrationsConfig)
    """The demonstrations in front of each row."""
    student_demonstrations: Annotated[int, Field(ge=0)] | None = None
    """Number of demonstrations that the student reads, the last ones; `null`: all."""
    targets: Literal["label_words", "tokens"] = "label_words"
    """`label_words`: the probabilities of a row's options, renormalized over them; every row needs options. `tokens`:
    the distribution over the vocabulary at each token of the output."""
    hard_label_weight: Share = 1.0
    """Weight α in α·hard + (1−α)·soft at the first step; it changes linearly."""
    final_hard_label_weight: Share | None = 0.0
    """α at the end; `null`: α is constant. The paper does not give its schedule; the default is rayk's choice."""
    text_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight β of the same hard and soft loss at every token that the student reads, demonstrations included. It helps
    if the tasks are those of the evaluation (Multitask-ICT) and hurts if they are new (Meta-ICT)."""

    def hard_label_weight_at(self, progress: float) -> float:
        """Return α after this share of the run."""
        last = self.hard_label_weight if self.final_hard_label_weight is None else self.final_hard_label_weight
        return self.hard_label_weight + (last - self.hard_label_weight) * progress

    @property
    def queries_teacher(self) -> bool:
        return self.hard_label_weight < 1 or self.final_hard_label_weight not in (None, 1)

    @property
    def signal_support(self) -> Support | None:
        return self.support if self.queries_teacher else None

    @property
    def shown_demonstrations(self) -> DemonstrationsConfig | None:
        return self.demonstrations

    @property
    def num_student_demonstrations(self) -> int:
        return self.demonstrations.k if self.student_demonstrations is None else self.student_demonstrations

    @property
    def requires_options(self) -> bool:
        return self.targets == "label_words"

    @model_validator(mode="after")
    def _check_parts(self) -> "InContextConfig":
        if self.student_demonstrations is not None and self.student_demonstrations > self.demonstrations.k:
            raise ValueError(
                f"student_demonstrations ({self.student_demonstrations}) is above the teacher's number of "
                f"demonstrations ({self.demonstrations.k}); raise demonstrations.k"
            )
        if self.targets == "label_words" and not self.text_weight:
            object.__setattr__(self, "support", Logprob())  # label words need only the log-probs of the options
        elif self.queries_teacher and isinstance(self.support, Logprob | Requested | Layers):
            raise ValueError(f"in_context cannot compare tokens by support '{self.support.kind}'; use 'topk' or "
                             "'hidden'")  # fmt: skip
        return self

    def check(self, run: Run) -> None:
        super().check(run)
        draws, choice = run.evaluation.demonstration_draws, self.demonstrations.choice
        if draws > 1 and choice != "random":
            raise ValueError(
                f"evaluation.demonstration_draws is {draws}, but method.demonstrations.choice '{choice}' always "
                "chooses the same demonstrations; leave it out, or choose 'random'"
            )
        self._check_rows(run)
        if run.ensemble is not None and self.targets == "label_words":
            raise ValueError(
                "an ensemble returns no probabilities of whole label words; use one teacher, or method.targets: tokens"
            )
        for teacher in run.teachers:
            if teacher.prompt_template is not None:
                raise ValueError(
                    f"teacher '{teacher.name}' has a prompt_template, but method 'in_context' decides what each model "
                    "reads; leave it out"
                )
        if self.demonstrations.retriever is not None:
            self._check_retriever(self.demonstrations.retriever, run)

    def _check_rows(self, run: Run) -> None:
        if run.synthesis is not None:
            raise ValueError(
                "method 'in_context' uses training rows as demonstrations and needs all of them at the start; run "
                "`rayk synthesize` with another method first, and set data.train to its rows.parquet"
            )
        if run.data.chat_template:
            raise ValueError("method 'in_context' formats rows itself; leave data.chat_template out")
        sources = {
            "data.train": run.data.train, "data.evaluation": run.data.evaluation,
            "method.demonstrations.pool": self.demonstrations.pool,
        }  # fmt: skip
        for name, source in sources.items():
            if source is not None and source.format not in ("auto", ROW_FORMAT):
                raise ValueError(
                    f"{name}.format is '{source.format}', but method 'in_context' needs an input and an output in each "
                    "row; leave it out, and set prompt_field and completion_field"
                )

    def _check_retriever(self, retriever: RetrieverConfig, run: Run) -> None:
        place = "method.demonstrations.retriever.teacher"
        names = [teacher.name for teacher in run.teachers]
        check_teacher_name(place, retriever.teacher, names)
        if not names:
            raise ValueError("method.demonstrations.choice 'learned' needs a teacher; add one under 'teachers'")
        if retriever.teacher is None and (run.ensemble or run.route):
            raise ValueError(
                f"{place} is missing: one teacher scores candidates, but 'ensemble' or 'route' is set; name one of "
                f"them ({', '.join(names)})"
            )
        scorer = next(teacher for teacher in run.teachers if teacher.name == run.retriever_teacher)
        if not scorer.gives_signals:
            raise ValueError(
                f"{place}: '{scorer.name}' is an endpoint (engine kind '{scorer.engine.kind}') and gives no log-probs "
                "of right answers; name another teacher"
            )
