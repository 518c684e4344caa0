"""One run: all sections together, and what must hold between them."""

from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, model_validator

from rayk.config.base import Positive, Settings
from rayk.config.cache import CacheConfig
from rayk.config.data import DataConfig
from rayk.config.evaluation import EvaluationConfig
from rayk.config.filters import JudgeFilterConfig, LengthFilterConfig
from rayk.config.methods import (
    InContextConfig,
    MethodConfig,
    MiniLLMConfig,
    OnPolicyConfig,
    PreferenceConfig,
    TeacherMethodConfig,
)
from rayk.config.retriever import RetrieverConfig
from rayk.config.rollouts import RolloutConfig, ServedRollouts, WorkerRollouts
from rayk.config.support import Support
from rayk.config.synthesis import MagpieConfig, SynthesisConfig
from rayk.config.teachers import EnsembleConfig, RouteConfig, TeacherConfig, check_engine_gives
from rayk.config.training import StudentConfig, TrainingConfig


class TrackingConfig(Settings):
    """Where curves go besides `metrics.jsonl`."""

    tensorboard: bool = True


class RunConfig(Settings):
    """One run: who teaches, who learns, from what, how."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    output: str | None = None
    """The run directory; by default runs/NAME. On several nodes it must be a path that all of them share."""
    seed: Annotated[int, Field(ge=0)] = 0
    teachers: list[TeacherConfig] = Field(default_factory=list)
    ensemble: EnsembleConfig | None = None
    """Ask several teachers as one."""
    route: RouteConfig | None = None
    """Let a row's field choose its teacher."""
    student: StudentConfig
    data: DataConfig
    synthesis: SynthesisConfig | None = None
    """Let a teacher write the training rows; `null`: `data.train` is learned from as it is."""
    rounds: Positive = 1
    """Write rows and train so often, each time with the student of the round before; for a synthesis whose rows depend
    on the student. Each round is a run directory of its own, OUTPUT/rounds/01 and so on."""
    method: MethodConfig
    rollouts: RolloutConfig | None = None
    """How the student writes, for methods that learn from what it writes; theirs by default, no one else's."""
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    cache: CacheConfig | None = None
    """Keep the teachers' signals on disk; `null`: ask every time."""
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    @model_validator(mode="after")
    def _parts_fit(self) -> "RunConfig":
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) < len(names):
            raise ValueError(f"teachers: two share a name ({', '.join(names)})")
        wanted = getattr(self.method, "teacher", None)
        if isinstance(self.method, TeacherMethodConfig) and self.method.asks_teacher and not names:
            raise ValueError(f"method.kind '{self.method.kind}' needs a teacher; add one under 'teachers'")
        if wanted is not None and wanted not in names:
            raise ValueError(
                f"method.{self._asking} '{wanted}' is none of the teachers ({', '.join(names) or 'there are none'})"
            )
        self._rows_can_be_had(names)
        self._many_teachers_fit(names, wanted)
        self._signals_can_be_had()
        self._pairs_can_be_read()
        self._demonstrations_can_be_shown()
        self._retriever_can_learn(names)
        self._completions_can_be_written()
        for teacher in self.teachers:
            support = self.signal_support
            asked = wanted in (None, teacher.name) and teacher.name not in self.synthesis_only_teachers
            if support is not None and not teacher.attach and asked:
                try:
                    check_engine_gives(teacher.engine, support)
                except ValueError as error:
                    raise ValueError(f"teacher '{teacher.name}': {error}") from error
            if teacher.deadline_seconds >= self.training.collective_timeout_seconds:
                raise ValueError(
                    f"teacher '{teacher.name}': deadline_seconds must be below training.collective_timeout_seconds "
                    f"({self.training.collective_timeout_seconds:g})"
                )
        if self.evaluation.generation and not self.data.evaluation:
            raise ValueError("evaluation.generation needs rows: set data.evaluation")
        return self

    def _rows_can_be_had(self, names: list[str]) -> None:
        if self.synthesis is None:
            if self.data.train is None:
                raise ValueError("data.train is missing; set it")
            if self.rounds > 1:
                raise ValueError(
                    f"rounds is {self.rounds}, but without 'synthesis' nothing is written in a round; leave it out"
                )
            return
        if not names:
            raise ValueError("synthesis needs a teacher that writes; add one under 'teachers'")
        if self.synthesis.teacher not in (None, *names):
            named = f"synthesis.teacher '{self.synthesis.teacher}'"
            raise ValueError(f"{named} is none of the teachers ({', '.join(names)})")
        if self.referee not in names:
            raise ValueError(f"synthesis.referee '{self.referee}' is none of the teachers ({', '.join(names)})")
        self._student_can_be_asked()
        given = self.data.train is not None or self.synthesis.prompts is not None
        if self.synthesis.makes_prompts and given:
            raise ValueError(
                f"synthesis '{self.synthesis.kind}' makes up its own prompts; leave out data.train and "
                "synthesis.prompts"
            )
        if not self.synthesis.makes_prompts and (self.data.train is None) == (self.synthesis.prompts is None):
            raise ValueError(
                f"synthesis '{self.synthesis.kind}' writes for the prompts of data.train or of synthesis.prompts; set "
                "one of the two"
            )
        for name in self.judges:
            if name not in names:
                raise ValueError(
                    f"synthesis.filters: judge's teacher '{name}' is none of the teachers ({', '.join(names)})"
                )
        for teacher in self.teachers:
            if teacher.name in self.synthesis_only_teachers and teacher.prompt_template is not None:
                raise ValueError(
                    f"teacher '{teacher.name}' only writes, so its prompt_template is not read; use a prompt_template "
                    "of the rows it writes for (data.train or synthesis.prompts)"
                )
        writer = next(teacher for teacher in self.teachers if teacher.name == self.synthesis_teacher)
        if writer.attach or writer.engine.kind != "openai":
            return
        if self.synthesis.chat:
            raise ValueError(
                f"synthesis.chat: teacher '{writer.name}' is an endpoint with a chat template of its own; leave it out "
                "and see to engine.chat"
            )
        filters = [*self.synthesis.filters, *getattr(self.synthesis, "instruction_filters", [])]
        if any(isinstance(each, LengthFilterConfig) and each.unit == "tokens" for each in filters):
            raise ValueError(
                f"synthesis.filters: 'length' counts tokens, which teacher '{writer.name}' does not tell; set another "
                "unit"
            )
        if isinstance(self.synthesis, MagpieConfig) and (writer.engine.chat or self.synthesis.tokenizer is None):
            raise ValueError(
                f"synthesis 'magpie' feeds the beginning of a user's turn, which chat completions do not take: teacher "
                f"'{writer.name}' needs engine.chat: false (an endpoint that has plain completions), and "
                "synthesis.tokenizer whose chat template it is"
            )
        if self.synthesis.needs_logprobs and not writer.engine.logprobs:
            raise ValueError(
                f"synthesis.scorer 'mean_logprob' needs log-probs of teacher '{writer.name}'; set engine.logprobs, or "
                "another scorer"
            )

    def _student_can_be_asked(self) -> None:
        assert self.synthesis is not None
        if self.rounds > 1 and not self.synthesis.reads_student:
            raise ValueError(
                f"rounds is {self.rounds}, but what synthesis '{self.synthesis.kind}' writes does not depend on the "
                "student, so every round would be the same; leave it out"
            )
        if self.synthesis.asks_student(0) and self.student.model is None:
            raise ValueError(
                f"synthesis '{self.synthesis.kind}' asks the student for answers as the run begins, but "
                "'student.config' makes one with random weights; give student.model"
            )

    def _many_teachers_fit(self, names: list[str], wanted: str | None) -> None:
        if wanted is not None and (self.ensemble or self.route):
            raise ValueError(
                f"method.{self._asking} names one teacher, but 'ensemble' or 'route' is set; leave one out"
            )
        if self.ensemble is not None:
            members = self.ensemble.teachers or names
            if len(members) < 2:
                raise ValueError("ensemble needs at least two teachers")
            for name in [*members, *self.ensemble.weights]:
                if name not in names:
                    raise ValueError(f"ensemble: '{name}' is none of the teachers ({', '.join(names)})")
        if self.route is not None:
            known = [*names, "ensemble"] if self.ensemble else names
            for name in [*self.route.teachers.values(), *filter(None, [self.route.default])]:
                if name not in known:
                    raise ValueError(f"route: '{name}' is none of the teachers ({', '.join(known)})")

    def _signals_can_be_had(self) -> None:
        for teacher in self.teachers:
            if teacher.name in self._asked_for_signals and not teacher.gives_signals:
                raise ValueError(
                    f"teacher '{teacher.name}': engine kind 'openai' writes text and gives no signals, so neither "
                    "'ensemble' nor 'route' nor a method but 'supervised' can use it; choose engine kind "
                    "'transformers' or 'vllm', or train on the text it writes with method 'supervised'"
                )

    def _demonstrations_can_be_shown(self) -> None:
        draws = self.evaluation.demonstration_draws
        if not isinstance(self.method, InContextConfig):
            if draws > 1:
                raise ValueError(
                    f"evaluation.demonstration_draws is set, but method '{self.method.kind}' shows no demonstrations; "
                    "leave it out"
                )
            return
        if draws > 1 and self.method.demonstrations.choice != "random":
            raise ValueError(
                f"evaluation.demonstration_draws is {draws}, but method.demonstrations.choice "
                f"'{self.method.demonstrations.choice}' chooses the same every time; leave it out, or choose 'random'"
            )
        if self.synthesis is not None:
            raise ValueError(
                "method 'in_context' shows its training rows to each other and needs them as it begins; run `rayk "
                "synthesize` with another method first, and set data.train to its rows.parquet"
            )
        if self.data.chat_template:
            raise ValueError("method 'in_context' lays rows out itself; leave data.chat_template out")
        sources = {
            "data.train": self.data.train, "data.evaluation": self.data.evaluation,
            "method.demonstrations.pool": self.method.demonstrations.pool,
        }  # fmt: skip
        for name, source in sources.items():
            if source is None:
                continue
            if source.format not in ("auto", "prompt_completion"):
                raise ValueError(
                    f"{name}.format is '{source.format}', but method 'in_context' needs an input and an output in each "
                    "row; leave it out, and set prompt_field and completion_field"
                )
            object.__setattr__(source, "format", "prompt_completion")
        if self.ensemble is not None and self.method.targets == "label_words":
            raise ValueError(
                "an ensemble gives no probabilities of whole label words; use one teacher, or method.targets: tokens"
            )
        for teacher in self.teachers:
            if teacher.prompt_template is not None:
                raise ValueError(
                    f"teacher '{teacher.name}' has a prompt_template, but method 'in_context' says itself what each "
                    "model reads; leave it out"
                )

    def _retriever_can_learn(self, names: list[str]) -> None:
        if (retriever := self.retriever) is None:
            return
        place = "method.demonstrations.retriever.teacher"
        if retriever.teacher not in (None, *names):
            listed = ", ".join(names) or "there are none"
            raise ValueError(f"{place} '{retriever.teacher}' is none of the teachers ({listed})")
        if not names:
            raise ValueError("method.demonstrations.choice 'learned' needs a teacher; add one under 'teachers'")
        if retriever.teacher is None and (self.ensemble or self.route):
            raise ValueError(
                f"{place} is missing: one teacher scores candidates, but 'ensemble' or 'route' is set; name one of "
                f"them ({', '.join(names)})"
            )
        scorer = next(teacher for teacher in self.teachers if teacher.name == self.retriever_teacher)
        if not scorer.gives_signals:
            raise ValueError(
                f"{place}: '{scorer.name}' is an endpoint (engine kind 'openai') and gives no log-probs of right "
                "answers; name another teacher"
            )

    def _pairs_can_be_read(self) -> None:
        pairs = self.synthesis is not None and self.synthesis.writes_pairs
        if not isinstance(self.method, PreferenceConfig):
            if self.synthesis is not None and pairs:
                raise ValueError(
                    f"synthesis '{self.synthesis.kind}' writes a better and a worse answer a row, from which only "
                    f"method 'preference' learns; use it instead of '{self.method.kind}', or another synthesis"
                )
            return
        if pairs:
            return
        if self.synthesis is not None:
            raise ValueError(
                f"synthesis '{self.synthesis.kind}' writes one answer a row, but method 'preference' learns from pairs;"
                " use synthesis 'preferences', another method, or rows that have pairs"
            )
        if self.data.train is not None and self.data.train.format not in ("auto", "preference"):
            raise ValueError(
                f"data.train.format is '{self.data.train.format}', but method 'preference' learns from pairs of "
                "answers; leave it out"
            )

    def _completions_can_be_written(self) -> None:
        if not isinstance(self.method, OnPolicyConfig | MiniLLMConfig):
            if self.rollouts is not None:
                raise ValueError(f"rollouts is set, but method '{self.method.kind}' samples nothing; leave it out")
            return
        rollouts = self.rollouts or WorkerRollouts()
        object.__setattr__(self, "rollouts", rollouts)
        self._agree_before_collectives_end(rollouts)
        self._vllm_can_write(rollouts)
        sampled_plainly = (rollouts.temperature, rollouts.top_p, rollouts.top_k) == (1.0, 1.0, 0)
        if not sampled_plainly and (isinstance(self.method, MiniLLMConfig) or self.method.form == "policy"):
            raise ValueError(
                f"{self.method.kind}'s policy gradient holds for completions sampled at temperature 1 without "
                "truncation; leave rollouts.temperature, top_p and top_k out"
            )
        if isinstance(self.method, MiniLLMConfig):
            self._completions_can_be_mixed(self.method)
            return
        if self.method.adaptive and not (self.data.evaluation and self.evaluation.every_steps):
            raise ValueError(
                "method.adaptive needs to know the evaluation loss; set data.evaluation and evaluation.every_steps"
            )
        if self.method.teacher_written and (self.ensemble or self.route):
            raise ValueError(
                "method.teacher_written needs one teacher that writes, but 'ensemble' or 'route' is set; set it to 0"
            )
        written_by = next(teacher for teacher in self.teachers if teacher.name == self.evaluation_teacher)
        if self.method.teacher_written and written_by.prompt_template is not None:
            raise ValueError(
                f"method.teacher_written: teacher '{written_by.name}' has a prompt_template, and what it writes after "
                "its own prompt is not what it says about the student's; set one of the two aside"
            )

    def _vllm_can_write(self, rollouts: RolloutConfig) -> None:
        if not isinstance(rollouts, ServedRollouts) or rollouts.engine.kind != "vllm":
            return
        if not (rollouts.temperature == 0 or 0.01 <= rollouts.temperature <= 2):
            raise ValueError(
                f"rollouts.temperature is {rollouts.temperature:g}, but vLLM samples at temperatures from 0.01 to 2, "
                "or 0 for greedy"
            )
        weighs = isinstance(self.method, MiniLLMConfig) or getattr(self.method, "form", "") == "policy"
        if weighs and "bfloat16" in (self.training.precision, self.student.dtype):
            raise ValueError(
                f"{self.method.kind}'s policy gradient weighs tokens by log-probs that the training step must be able "
                "to compute again, which vLLM's in bfloat16 are not; use rollouts.engine.kind 'transformers', or "
                "training.precision and student.dtype 'float32'"
            )

    def _agree_before_collectives_end(self, rollouts: RolloutConfig) -> None:
        limit = self.training.collective_timeout_seconds
        for name in ("timeout_seconds", "deadline_seconds"):
            if (getattr(rollouts, name, None) or 0) >= limit:
                raise ValueError(f"rollouts.{name} must be below training.collective_timeout_seconds ({limit:g})")

    def _completions_can_be_mixed(self, method: MiniLLMConfig) -> None:
        if method.minibatches * max(1, self.training.workers) > self.training.batch_size:
            raise ValueError(
                f"method.minibatches ({method.minibatches}) for each of training.workers ({self.training.workers}) "
                f"need as many rows, but training.batch_size is {self.training.batch_size}; raise it"
            )
        beside = method.pretraining and method.pretraining.batch_size
        if beside and method.minibatches * max(1, self.training.workers) > beside:
            raise ValueError(
                f"method.minibatches ({method.minibatches}) for each of training.workers ({self.training.workers}) "
                f"need as many rows of text, but method.pretraining.batch_size is {beside}; raise it"
            )
        if not method.teacher_share:
            return
        if self.ensemble or self.route:
            raise ValueError(
                "method.teacher_share needs one teacher to write with, but 'ensemble' or 'route' is set; set it to 0"
            )
        if isinstance(self.rollouts, ServedRollouts):
            raise ValueError(
                "method.teacher_share has student and teacher write together, which the student does in the training "
                "worker; use rollouts.kind 'worker', or set method.teacher_share to 0"
            )
        writer = next(teacher for teacher in self.teachers if teacher.name == self.evaluation_teacher)
        if writer.prompt_template is not None or (writer.engine.kind != "transformers" and not writer.attach):
            raise ValueError(
                f"method.teacher_share: teacher '{writer.name}' cannot write together with the student; it needs "
                "engine kind 'transformers' and no prompt_template, or set method.teacher_share to 0"
            )

    @property
    def signal_support(self) -> Support | None:
        """What the method asks teachers for; None where it asks nothing."""
        return getattr(self.method, "support", None) if getattr(self.method, "asks_teacher", True) else None

    @property
    def _asking(self) -> str:
        """The method's setting that names whom it asks."""
        return "reference" if isinstance(self.method, PreferenceConfig) else "teacher"

    @property
    def _asked_for_signals(self) -> list[str]:
        """The teachers that method, ensemble and route ask for signals."""
        asked: list[str] = []
        if self.ensemble is not None:
            asked += self.ensemble.teachers or [teacher.name for teacher in self.teachers]
        if self.route is not None:
            asked += [*self.route.teachers.values(), *filter(None, [self.route.default])]
        if self.signal_support is not None and not asked:
            able = [t.name for t in self.teachers if t.name not in self.synthesis_teachers or t.gives_signals]
            asked = [getattr(self.method, "teacher", None) or [*able, self.teachers[0].name][0]]
        return asked

    @property
    def retriever(self) -> RetrieverConfig | None:
        """How demonstrations are learned to be found; None where they are not."""
        return self.method.demonstrations.retriever if isinstance(self.method, InContextConfig) else None

    @property
    def retriever_teacher(self) -> str:
        """The teacher that scores demonstrations for the retriever; "" without one."""
        if self.retriever is None:
            return ""
        return self.retriever.teacher or self.evaluation_teacher or self.teachers[0].name

    @property
    def synthesis_teacher(self) -> str:
        """The teacher that writes the training rows; "" without synthesis."""
        return (self.synthesis.teacher or self.teachers[0].name) if self.synthesis else ""

    @property
    def referee(self) -> str:
        """The teacher that compares what is written; the writer where `synthesis` names no other."""
        return getattr(self.synthesis, "referee", None) or self.synthesis_teacher

    @property
    def judges(self) -> list[str]:
        """The teachers that judge what is written, a filter `judge` each."""
        filters = self.synthesis.filters if self.synthesis else []
        return [each.teacher or self.synthesis_teacher for each in filters if isinstance(each, JudgeFilterConfig)]

    @property
    def synthesis_teachers(self) -> list[str]:
        """The teachers that are up while the training rows are written."""
        return list(dict.fromkeys([self.synthesis_teacher, self.referee, *self.judges])) if self.synthesis else []

    @property
    def synthesis_only_teachers(self) -> list[str]:
        """The teachers that nobody needs once the training rows are written."""
        return [name for name in self.synthesis_teachers if name not in self._asked_for_signals]

    @property
    def training_teachers(self) -> list[TeacherConfig]:
        """The teachers that are up in training and evaluation."""
        return [teacher for teacher in self.teachers if teacher.name not in self.synthesis_only_teachers]

    @property
    def signal_teachers(self) -> list[TeacherConfig]:
        """Those of them that can be asked for signals."""
        return [teacher for teacher in self.training_teachers if teacher.gives_signals]

    @property
    def evaluation_teacher(self) -> str:
        """The teacher that evaluation measures the student against: the method's, or the first that gives signals; ""
        without any."""
        return getattr(self.method, "teacher", None) or next((each.name for each in self.signal_teachers), "")

    @property
    def output_path(self) -> Path:
        return Path(self.output or f"runs/{self.name}").expanduser().absolute()

    @property
    def checkpoints(self) -> str:
        """The folder or URI where checkpoints go."""
        return self.training.checkpoints or str(self.output_path / "checkpoints")

    def to_yaml(self) -> str:
        """The resolved settings, as `rayk run` reads them."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
