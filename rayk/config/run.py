"""The settings of one run: all sections, the teachers' roles, and checks across sections."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, model_validator

from rayk.config.base import Placement, Positive, Settings
from rayk.config.cache import CacheConfig
from rayk.config.data import DataConfig
from rayk.config.evaluation import EvaluationConfig
from rayk.config.following import check_following
from rayk.config.methods import MethodConfig
from rayk.config.paths import absolute_path, is_uri
from rayk.config.roles import TeacherRoles
from rayk.config.rollouts import RolloutConfig, WorkerRollouts
from rayk.config.secrets import hide, redact, remember_secrets
from rayk.config.syntheses import SynthesisConfig
from rayk.config.teachers import EnsembleConfig, RouteConfig, TeacherConfig, check_teacher_name
from rayk.config.tracking import TrackingConfig
from rayk.config.training import StudentConfig, TrainingConfig


class RunConfig(TeacherRoles, Settings):
    """One run: its teachers, student, data and method."""

    name: Annotated[str, Placement()] = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run's name in reports."""
    output: Annotated[str | None, Placement()] = None
    """The run directory, relative to the current folder; `null`: runs/NAME. On several nodes it must be a path that all
    of them share. It cannot be a URI; `training.checkpoints` and `student.save_to` can."""
    seed: Annotated[int, Field(ge=0)] = 0
    """The seed of all random numbers."""
    teachers: list[TeacherConfig] = Field(default_factory=list)
    """The models that are queried for signals or generate training rows."""
    ensemble: EnsembleConfig | None = None
    """Average the distributions of several teachers; `null`: one teacher."""
    route: RouteConfig | None = None
    """Choose each row's teacher by one of its fields; `null`: all rows have the same teacher."""
    student: StudentConfig
    """The model that is trained."""
    data: DataConfig
    """The rows that a run trains on and is evaluated on."""
    synthesis: SynthesisConfig | None = None
    """Training rows that a teacher generates; `null`: `data.train` is trained on as it is."""
    rounds: Positive = 1
    """Number of rounds of synthesis and training, for a synthesis whose rows depend on the student. Each round starts
    from the previous round's student and has its own run directory: OUTPUT/rounds/01 and so on."""
    method: MethodConfig
    """The distillation method."""
    rollouts: RolloutConfig | None = None
    """Generation of completions by the student during training, for methods that train on them; `null`: the defaults
    of this section."""
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    """The optimization and where it runs."""
    evaluation: Annotated[EvaluationConfig, Placement()] = Field(default_factory=EvaluationConfig)
    """Measurements on held-out rows."""
    cache: CacheConfig | None = None
    """Store the teachers' signals on disk; `null`: signals are requested every time."""
    tracking: Annotated[TrackingConfig, Placement()] = Field(default_factory=TrackingConfig)
    """Output of the training curves."""

    @model_validator(mode="after")
    def _complete_and_check(self) -> "RunConfig":
        remember_secrets(self.model_dump(mode="json"))
        if self.method.samples_rollouts and self.rollouts is None:
            object.__setattr__(self, "rollouts", WorkerRollouts())
        if self.method.row_format is not None:
            rows = {"train": self.data.train, "evaluation": self.data.evaluation}
            typed = {name: rows and rows.with_default_format(self.method.row_format) for name, rows in rows.items()}
            object.__setattr__(self, "data", self.data.model_copy(update=typed))
        self._complete_training()
        for checks in (self._name_checks, self._section_checks):
            if errors := [str(error) for check in checks() if (error := _error_of(check)) is not None]:
                raise ValueError("\n".join(errors))
        return self

    def _complete_training(self) -> None:
        """Set the learning rate, its warmup and the precision that follow from the method and the student."""
        changes: dict[str, Any] = {}
        lora = self.student.lora
        if self.training.learning_rate is None:
            method = self.method
            changes["learning_rate"] = method.default_adapter_learning_rate if lora else method.default_learning_rate
        if self.training.warmup_steps is None and self.training.warmup_share is None:
            changes["warmup_share"] = self.method.default_warmup_share
        if self.student.dtype == "bfloat16" and (lora is None or lora.modules_to_save):
            changes["precision"] = "bfloat16"
        if changes:
            object.__setattr__(self, "training", self.training.model_copy(update=changes))

    def _name_checks(self) -> Iterator[Callable[[], None]]:
        """Yield the checks that must pass before `_section_checks`."""
        yield self._check_output
        yield self._check_names
        yield self._check_rows

    def _section_checks(self) -> Iterator[Callable[[], None]]:
        yield lambda: self.method.check(self)
        if self.synthesis is not None:
            synthesis = self.synthesis
            yield lambda: synthesis.check(self)
        if self.rollouts is not None:
            rollouts = self.rollouts
            yield lambda: rollouts.check(self)
        yield self._check_evaluation
        for teacher in self.teachers:
            yield lambda teacher=teacher: self._check_teacher(teacher)  # type: ignore[misc]

    def _check_output(self) -> None:
        if self.output is not None and is_uri(self.output):
            raise ValueError(
                f"output is '{hide(self.output)}', but a run directory is a folder; give one that all nodes share, and "
                "set training.checkpoints and student.save_to to URIs"
            )

    def _check_names(self) -> None:
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) < len(names):
            raise ValueError(f"teachers: two share a name ({', '.join(names)})")
        if self.ensemble is not None:
            members = self.ensemble.teachers or names
            if len(members) < 2:
                raise ValueError("ensemble needs at least two teachers")
            for name in [*members, *self.ensemble.weights]:
                check_teacher_name("ensemble:", name, names)
        if self.route is not None:
            known = [*names, "ensemble"] if self.ensemble else names
            for value, name in self.route.teachers.items():
                check_teacher_name(f"route.teachers.{value}:", name, known)
            check_teacher_name("route.default:", self.route.default, known)

    def _check_rows(self) -> None:
        if self.synthesis is None and self.data.train is None:
            raise ValueError("data.train is missing; set it")
        if self.synthesis is None and self.rounds > 1:
            raise ValueError(f"rounds is {self.rounds}, but without 'synthesis' it has no effect; leave it out")

    def _check_evaluation(self) -> None:
        if self.evaluation.generation and not self.data.evaluation:
            raise ValueError("evaluation.generation needs rows: set data.evaluation")
        if self.evaluation.keep_best is None:
            return
        if not self.data.evaluation or self.evaluation.every_steps is None:
            raise ValueError(
                "evaluation.keep_best compares the evaluations of a run; set data.evaluation and evaluation.every_steps"
            )
        measured = self.evaluation.measured_metrics(
            teacher=self.compares_teacher, pairs=self.method.reads_pairs,
            options=self.method.shown_demonstrations is not None,
        )  # fmt: skip
        self.evaluation.keep_best.check(measured)

    def _check_teacher(self, teacher: TeacherConfig) -> None:
        if teacher.follows is not None:
            check_following(teacher, self)
        if teacher.name in self.signal_teacher_names and not teacher.gives_signals:
            raise ValueError(
                f"teacher '{teacher.name}': engine kind '{teacher.engine.kind}' generates text and gives no signals, "
                "so 'ensemble', 'route' and all methods except 'supervised' cannot use it; choose engine kind "
                "'transformers' or 'vllm', or train on the text it generates with method 'supervised'"
            )
        is_used = self.method.teacher_name in (None, teacher.name) and teacher.name not in self.synthesis_only_teachers
        if self.signal_support is not None and not teacher.attach and is_used:
            try:
                teacher.engine.check_support(self.signal_support)
            except ValueError as error:
                raise ValueError(f"teacher '{teacher.name}': {error}") from error
        if teacher.chat_template_kwargs and teacher.name not in self.synthesis_teachers:
            raise ValueError(
                f"teacher '{teacher.name}': chat_template_kwargs has no effect, because this teacher generates no "
                "training rows; set data.chat_template_kwargs, with which rows are rendered"
            )
        limit = self.training.collective_timeout_seconds
        if teacher.deadline_seconds >= limit:
            raise ValueError(
                f"teacher '{teacher.name}': deadline_seconds must be below training.collective_timeout_seconds "
                f"({limit:g})"
            )

    @property
    def output_path(self) -> Path:
        """The run directory as an absolute path."""
        return Path(absolute_path(self.output or f"runs/{self.name}"))

    @property
    def checkpoints(self) -> str:
        """The folder or URI of the checkpoints."""
        return self.training.checkpoints or str(self.output_path / "checkpoints")

    def to_yaml(self) -> str:
        """Return the resolved settings as YAML. Secrets are masked; `rayk run` can read settings without any."""
        return yaml.safe_dump(redact(self.model_dump(mode="json")), sort_keys=False, allow_unicode=True)


def _error_of(check: Callable[[], None]) -> ValueError | None:
    try:
        check()
    except ValueError as error:
        return error
    return None
