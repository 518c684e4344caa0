"""Base classes of the sections that have several kinds and depend on each other: method, synthesis and rollouts.

The properties of each base class describe a kind to the other sections; their defaults fit most kinds. `check(run)`
checks a section against the other sections, of which it may read the attributes of `Run`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import Field, model_validator

from rayk.config.base import Placement, Positive, Selection, Settings
from rayk.config.data import DataConfig, DataSource, RowFormat
from rayk.config.demonstrations import DemonstrationsConfig
from rayk.config.evaluation import EvaluationConfig
from rayk.config.filters import FilterConfig, FilterSettings, TruncatedFilterConfig
from rayk.config.pretraining import PretrainingConfig
from rayk.config.retriever import RetrieverConfig
from rayk.config.sampling import SamplingConfig, ServedStudentConfig
from rayk.config.stages import Stage
from rayk.config.support import Support
from rayk.config.teachers import EnsembleConfig, RouteConfig, TeacherConfig, check_teacher_name
from rayk.config.tools import ToolConfig
from rayk.config.training import StudentConfig, TrainingConfig

Normalization = Literal["tokens", "sequences", "teachers"]


class MethodSettings(Settings):
    """Base of all methods' settings. Its properties describe the method to the other sections."""

    teacher_key: ClassVar[str] = "teacher"
    """The key that names the teacher to query."""
    row_format: ClassVar[RowFormat | None] = None
    """The format that rows must have; None for any."""
    default_learning_rate: ClassVar[float] = 1e-4
    """The learning rate if the settings give none, for a student whose weights are all trained."""
    default_adapter_learning_rate: ClassVar[float] = 1e-4
    """The learning rate if the settings give none, for an adapter (`student.lora`)."""
    default_warmup_share: ClassVar[float] = 0.03  # of the training of Alpaca and Vicuna; MiniLLM's is 0.02
    """The warmup if the settings give none, as a share of the run's steps."""

    kind: str
    """The method's kind."""

    @model_validator(mode="before")
    @classmethod
    def _check_alignment(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("alignment") is not None and "alignment" not in cls.model_fields:
            raise ValueError(
                f"method '{given.get('kind')}' needs a teacher with the student's tokenizer; only 'logit_kd' and "
                "'on_policy' have 'alignment'. To learn from another teacher's text, use 'supervised' with synthesis "
                "'responses'"
            )
        return given

    @property
    def signal_support(self) -> Support | None:
        """The support that the method requests of its teacher; None if it queries none."""
        return None

    @property
    def aligns_tokens(self) -> bool:
        """Return whether the teacher may have another tokenizer than the student."""
        return False

    @property
    def teacher_name(self) -> str | None:
        """The teacher that the settings name; None if they name none."""
        return None

    @property
    def queries_teacher(self) -> bool:
        """Return whether the method queries a teacher for signals."""
        return self.signal_support is not None

    @property
    def reads_pairs(self) -> bool:
        """Return whether rows are preference pairs."""
        return False

    @property
    def reads_completions(self) -> bool:
        """Return whether any of the rows' own completions are trained on; if not, rows need only prompts."""
        return True

    @property
    def samples_rollouts(self) -> bool:
        """Return whether the student generates completions while it is trained (section `rollouts`)."""
        return False

    @property
    def normalization(self) -> Normalization:
        """The units over which a step's loss is a mean."""
        return "tokens"

    @property
    def samples_with_teacher(self) -> bool:
        """Return whether completions are sampled from a mixture of the student's and the teacher's distributions."""
        return False

    @property
    def weighs_rollout_logprobs(self) -> bool:
        """Return whether the loss divides by the log-probs under which the completions were sampled."""
        return False

    @property
    def shown_demonstrations(self) -> DemonstrationsConfig | None:
        """The demonstrations in front of each row; None if there are none."""
        return None

    @property
    def num_student_demonstrations(self) -> int:
        """Number of the shown demonstrations that the student reads, the last ones."""
        return 0

    @property
    def requires_options(self) -> bool:
        """Return whether each row must list its possible outputs."""
        return False

    def hard_label_weight_at(self, progress: float) -> float:
        """Return the weight of the rows' own labels; the teacher's have the remaining weight.

        Args:
            progress: the share of the run that has passed, from 0 to 1.
        """
        return 1.0

    @property
    def auxiliary_data(self) -> PretrainingConfig | None:
        """Plain text that is trained on in the same updates; None if there is none."""
        return None

    @property
    def student_layers(self) -> int | list[int] | None:
        """The student's layers whose states the method reads, by number, or how many of them; None: none."""
        return None

    def check_steps(self, steps: int) -> None:
        """Check the number of the run's steps, which is known once the rows are read.

        Raises:
            InputError: the run is too short for the method.
        """

    def stage(self, step: int, steps: int) -> Stage:
        """Return the place of a step in its stage; by default the run is one stage.

        Args:
            step: the step's number, from 0.
            steps: number of steps of the run.
        """
        return Stage(step, steps)

    def check(self, run: "Run") -> None:
        """Check the method against the run's other sections.

        Raises:
            ValueError: the sections do not fit together; the message says what to change.
        """
        names = [teacher.name for teacher in run.teachers]
        if self.queries_teacher and self.teacher_name is None and not names:
            raise ValueError(f"method.kind '{self.kind}' needs a teacher; add one under 'teachers'")
        if self.teacher_name is not None:
            check_teacher_name(f"method.{self.teacher_key}", self.teacher_name, names)
            if run.ensemble or run.route:
                raise ValueError(
                    f"method.{self.teacher_key} names one teacher, but 'ensemble' or 'route' is set; leave one out"
                )
        if run.synthesis is not None and run.synthesis.writes_pairs and not self.reads_pairs:
            raise ValueError(
                f"synthesis '{run.synthesis.kind}' generates a better and a worse answer for each row, which only "
                f"method 'preference' trains on; use it instead of '{self.kind}', or another synthesis"
            )
        if self.shown_demonstrations is None and run.evaluation.demonstration_draws > 1:
            raise ValueError(
                f"evaluation.demonstration_draws is set, but method '{self.kind}' shows no demonstrations; leave it out"
            )
        if not self.samples_rollouts and run.rollouts is not None:
            raise ValueError(f"rollouts is set, but method '{self.kind}' samples nothing; leave it out")
        if self.weighs_rollout_logprobs and run.rollouts is not None and not run.rollouts.samples_exactly:
            raise ValueError(
                f"{self.kind}'s policy gradient holds for completions sampled at temperature 1 without truncation; "
                "leave rollouts.temperature, top_p and top_k out"
            )


class RolloutSettings(Settings):
    """Sampling of the student's completions during training, wherever they are generated."""

    max_new_tokens: Positive = 256
    """Longest completion in tokens. Longer ones are truncated; their tokens are trained on, with no EOS appended. A
    completion ends with one of the student's own end tokens (`generation_config.json`) or with the token that ends the
    training rows' completions."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Sampling temperature; 0 is greedy decoding. GKD's reverse KL is defined for temperature 1 without truncation."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the most likely tokens with this total probability; 1: from all."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Number of most likely tokens to sample from; 0: all."""
    samples: Positive = 1
    """Number of completions of each prompt in a step. `training.batch_size` counts completions, so a step has
    `batch_size / samples` prompts."""
    tool: ToolConfig | None = None
    """Answer the student's turns, so that a rollout has several (chats only); `null`: it ends after the first one."""
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """Age of the weights that generate, in optimizer steps: step i (from 0) trains on completions sampled with exactly
    the weights after i − `max_staleness` steps (the first steps: with the initial weights). 0 alternates generation and
    training; with 1 or more, completions for later steps are generated while a step trains. Both are reproducible; with
    served replicas only up to rounding, because timing decides which rows are computed together."""
    timeout_seconds: Annotated[float | None, Placement()] = Field(default=None, gt=0)
    """Longest time in seconds to generate one step's completions; then the run stops. `null`: no limit."""

    @property
    def samples_exactly(self) -> bool:
        """Return whether completions follow the student's own distribution: temperature 1, no truncation."""
        return (self.temperature, self.top_p, self.top_k) == (1.0, 1.0, 0)

    @property
    def max_tokens(self) -> int:
        """Return the largest number of tokens after a prompt: of all turns, and of the answers between them."""
        if self.tool is None:
            return self.max_new_tokens
        return self.tool.max_turns * self.max_new_tokens + (self.tool.max_turns - 1) * self.tool.max_answer_tokens

    @property
    def is_served(self) -> bool:
        """Return whether replicas on Ray Serve generate the completions; otherwise the training workers do."""
        return False

    def check(self, run: "Run") -> None:
        """Check the rollouts against the run's other sections; errors as `MethodSettings.check`."""
        limit = run.training.collective_timeout_seconds
        for name in ("timeout_seconds", "deadline_seconds"):
            if (getattr(self, name, None) or 0) >= limit:
                raise ValueError(f"rollouts.{name} must be below training.collective_timeout_seconds ({limit:g})")
        if run.training.batch_size % self.samples:
            raise ValueError(
                f"training.batch_size ({run.training.batch_size}) must be a multiple of rollouts.samples "
                f"({self.samples}): it counts completions"
            )
        if self.samples > 1 and run.method.reads_completions:
            raise ValueError(
                f"rollouts.samples is {self.samples}, but not all completions are generated, so a row's own one would "
                "be trained on as often; set method.student_fraction to 1, and leave 'adaptive' out"
            )
        if self.tool is not None and run.method.samples_with_teacher:
            raise ValueError("rollouts.tool answers the student alone; set method.teacher_share to 0")
        if self.tool is not None and run.method.aligns_tokens:
            raise ValueError(
                "rollouts.tool gives rollouts of several turns, but method.alignment reads a single one; leave one out"
            )


def _default_filters() -> list[FilterConfig]:
    return [TruncatedFilterConfig()]


class SynthesisSettings(Settings):
    """Base of all syntheses' settings. Its properties describe the synthesis to the other sections."""

    kind: str
    """The synthesis' kind."""
    teacher: str | None = None
    """Which of `teachers` generates the rows; `null`: the first. If the method does not query this teacher, it is
    stopped before training and may have another tokenizer than the student."""
    prompts: DataSource | None = None
    """The rows whose prompts are completed, instead of `data.train`. Their completions are not trained on. A generated
    row keeps the other fields of its source row."""
    chat: bool | None = None
    """Wrap each request in the chat template of the teacher's tokenizer, as a user's message; conversations keep their
    messages. `null`: if the student reads the rows in a chat template (`data.chat_template`, or rows of messages) and
    the teacher's tokenizer has one; never for kind `self_instruct`. For an endpoint (engine kind `openai`), set
    `engine.chat` instead."""
    thoughts: Annotated[Literal["drop", "keep"], Selection()] = "drop"
    """Handling of a reasoning model's thought (`<think>…</think>` before the answer). `drop`: rows contain the answer
    only, for students that answer without thinking. `keep`: completions begin with the thought. Filters, scorers and
    judges always read the answer only, and a completion that ends inside its thought is rejected as `truncated`. To
    switch thinking off, set the teacher's `chat_template_kwargs`."""
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    """Sampling of the teacher's completions."""
    filters: Annotated[list[FilterConfig], Selection()] = Field(default_factory=_default_filters)
    """Filters, applied in this order, with two exceptions: judges run after the filters that only read text, and
    filters that compare rows run last, after `keep`. The default rejects completions that were truncated at
    `sampling.max_new_tokens`, so that the student does not learn to stop there."""
    in_flight: Annotated[Positive, Placement()] = 64
    """Number of prompts that are requested at the same time."""

    @property
    def prefers_chat(self) -> bool:
        """Return whether `chat: null` follows the student, who may read the rows in a chat template."""
        return True

    def uses_chat(self, student_reads_chats: bool) -> bool:
        """Return whether requests are wrapped in a chat template, if the teacher's tokenizer has one."""
        if self.chat is not None:
            return self.chat
        return student_reads_chats and self.prefers_chat

    @property
    def reads_truth(self) -> bool:
        """Return whether the rows' right answers are needed."""
        return False

    @property
    def makes_prompts(self) -> bool:
        """Return whether the prompts are generated too, so that no rows are read."""
        return False

    @property
    def needs_logprobs(self) -> bool:
        """Return whether the log-probs of the teacher's completions are needed."""
        return False

    @property
    def writes_pairs(self) -> bool:
        """Return whether each row has a better and a worse answer, for method `preference`."""
        return False

    @property
    def reads_student(self) -> bool:
        """Return whether the rows depend on the student, so that there can be several `rounds`."""
        return False

    @property
    def served_student(self) -> ServedStudentConfig | None:
        """The settings of the served student; None if the student generates nothing."""
        return None

    @property
    def referee_name(self) -> str | None:
        """The teacher that compares answers; None: the teacher that generates the rows."""
        return None

    @property
    def all_filters(self) -> Sequence[FilterSettings]:
        """The filters of rows, and those of intermediate results such as instructions."""
        return self.filters

    def queries_student(self, round_number: int) -> bool:
        """Return whether the student generates answers in this round (counted from 0), with its weights at the start of
        the round."""
        return self.reads_student

    def check(self, run: "Run") -> None:
        """Check the synthesis against the run's other sections; errors as `MethodSettings.check`."""
        names = [teacher.name for teacher in run.teachers]
        if not names:
            raise ValueError("synthesis needs a teacher that generates; add one under 'teachers'")
        check_teacher_name("synthesis.teacher", self.teacher, names)
        check_teacher_name("synthesis.referee", self.referee_name, names)
        for judge in run.judges:
            check_teacher_name("synthesis.filters: judge's teacher", judge, names)
        self._check_prompts(run)
        self._check_student(run)
        for teacher in run.teachers:
            if teacher.name in run.synthesis_only_teachers and teacher.prompt_template is not None:
                raise ValueError(
                    f"teacher '{teacher.name}' only generates training rows, so its prompt_template is not read; use a "
                    "prompt_template of the rows it generates for (data.train or synthesis.prompts)"
                )
        teacher = next(teacher for teacher in run.teachers if teacher.name == run.synthesis_teacher)
        if not teacher.attach:
            self.check_teacher(teacher)

    def check_teacher(self, teacher: TeacherConfig) -> None:
        """Check that the engine of the teacher that generates can do what the synthesis needs; errors as `check`."""
        if self.chat and teacher.engine.applies_chat_template:
            raise ValueError(
                f"synthesis.chat: teacher '{teacher.name}' is an endpoint with its own chat template; leave it out and "
                "set engine.chat"
            )
        if not teacher.engine.counts_tokens and any(each.counts_tokens for each in self.all_filters):
            raise ValueError(
                f"synthesis.filters: 'length' counts tokens, which teacher '{teacher.name}' does not return; set "
                "another unit"
            )
        if self.needs_logprobs and not teacher.engine.generates_logprobs:
            raise ValueError(
                f"synthesis.scorer 'mean_logprob' needs log-probs of teacher '{teacher.name}'; set engine.logprobs, or "
                "another scorer"
            )

    def _check_prompts(self, run: "Run") -> None:
        has_rows = run.data.train is not None, self.prompts is not None
        if self.makes_prompts and any(has_rows):
            raise ValueError(
                f"synthesis '{self.kind}' makes its own prompts; leave out data.train and synthesis.prompts"
            )
        if any(source is not None and source.chunk_tokens for source in (run.data.train, self.prompts)):
            raise ValueError(
                f"chunk_tokens cuts text that is trained on as it is, but synthesis '{self.kind}' generates from "
                "prompts; leave it out"
            )
        if not self.makes_prompts and sum(has_rows) != 1:
            raise ValueError(
                f"synthesis '{self.kind}' completes the prompts of data.train or of synthesis.prompts; set one of the "
                "two"
            )

    def _check_student(self, run: "Run") -> None:
        if run.rounds > 1 and not self.reads_student:
            raise ValueError(
                f"rounds is {run.rounds}, but the rows of synthesis '{self.kind}' do not depend on the student, so "
                "every round would be the same; leave it out"
            )
        if self.queries_student(0) and run.student.model is None:
            raise ValueError(
                f"synthesis '{self.kind}' requests answers of the student before training, but 'student.config' "
                "creates one with random weights; give student.model"
            )
        if self.queries_student(0) and run.student.layers is not None:
            raise ValueError(
                f"synthesis '{self.kind}' requests answers of the student before training, but 'student.layers' cuts "
                "it then; train the cut student first, and give the result as student.model"
            )


class Run(Protocol):
    """The parts of a run that a section may read when it checks itself (`rayk.config.RunConfig`)."""

    @property
    def output_path(self) -> Path: ...
    @property
    def teachers(self) -> Sequence[TeacherConfig]: ...
    @property
    def ensemble(self) -> EnsembleConfig | None: ...
    @property
    def route(self) -> RouteConfig | None: ...
    @property
    def student(self) -> StudentConfig: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def synthesis(self) -> SynthesisSettings | None: ...
    @property
    def rounds(self) -> int: ...
    @property
    def method(self) -> MethodSettings: ...
    @property
    def rollouts(self) -> RolloutSettings | None: ...
    @property
    def training(self) -> TrainingConfig: ...
    @property
    def evaluation(self) -> EvaluationConfig: ...
    @property
    def signal_support(self) -> Support | None: ...
    @property
    def signal_teacher_names(self) -> Sequence[str]: ...
    @property
    def signal_teachers(self) -> Sequence[TeacherConfig]: ...
    @property
    def training_teachers(self) -> Sequence[TeacherConfig]: ...
    @property
    def retriever(self) -> RetrieverConfig | None: ...
    @property
    def evaluation_teacher(self) -> str: ...
    @property
    def aligned_teacher(self) -> str: ...
    @property
    def compares_teacher(self) -> bool: ...
    @property
    def retriever_teacher(self) -> str: ...
    @property
    def synthesis_teacher(self) -> str: ...
    @property
    def referee(self) -> str: ...
    @property
    def synthesis_teachers(self) -> Sequence[str]: ...
    @property
    def synthesis_only_teachers(self) -> Sequence[str]: ...
    @property
    def judges(self) -> Sequence[str]: ...
