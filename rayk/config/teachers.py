"""Teachers: the model, its engine and the number of copies; and the combination of several teachers."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from rayk.config.base import InputPath, Placement, Positive, Settings, StoragePath, default_kind
from rayk.config.engines import EngineConfig, TransformersEngineConfig


class Replicas(Settings):
    """Number of copies of a model: fixed if `min` equals `max`, else scaled with the demand."""

    min: Annotated[int, Field(ge=0)] = 1
    """Smallest number of replicas; with 0, no replica runs while there are no requests."""
    max: Positive = 1
    """Largest number of replicas."""
    waiting_tokens: Positive = 16_384
    """Tokens waiting per replica above which another replica is started."""
    up_seconds: Annotated[float, Field(ge=0)] = 5.0
    """Seconds that demand must stay high before scaling up."""
    down_seconds: Annotated[float, Field(ge=0)] = 60.0
    """Seconds that demand must stay low before scaling down."""

    @model_validator(mode="after")
    def _check_order(self) -> "Replicas":
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is larger than max ({self.max})")
        return self


class Resources(Settings):
    """Resources that Ray reserves for one replica or worker; with a fraction of a GPU, several share one GPU."""

    num_cpus: Annotated[float, Field(ge=0)] = 1.0
    """Number of CPUs."""
    num_gpus: Annotated[float, Field(ge=0)] | None = None
    """Number of GPUs; `null`: what the engine needs if the cluster has GPUs, else none."""
    custom: dict[str, float] = Field(default_factory=dict)
    """Amounts of Ray's custom resources by name, for example to choose the nodes."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels that the node must have, by name (`ray start --labels`, `labels` of a KubeRay worker group), such as
    `{rayk/group: teacher}`. Ray's autoscaler starts nodes of a group with these labels, from zero too."""


def _expand_number(value: Any) -> Any:
    return {"min": value, "max": value} if isinstance(value, int) else value


ReplicasConfig = Annotated[Replicas, BeforeValidator(_expand_number)]
"""`replicas: 2` is short for `{min: 2, max: 2}`."""


class EnsembleConfig(Settings):
    """Several teachers whose distributions are averaged."""

    teachers: list[str] = Field(default_factory=list)
    """Names of the members; empty: all of `teachers`."""
    combine: Literal["probabilities", "logits"] = "probabilities"
    """The averaged quantity: probabilities, or logits as in BabyLlama (arXiv 2308.02019)."""
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Each member's weight in the average by its name; 1 if not given. Weights need not sum to 1."""


class RouteConfig(Settings):
    """The teacher of each row, chosen by one of the row's fields."""

    field: str
    """The row's field whose value chooses the teacher."""
    teachers: dict[str, str]
    """The teacher's name (or 'ensemble') for each value of the field."""
    default: str | None = None
    """The teacher of rows with any other value, and of rows without the field; `null`: such a row is an error."""

    @property
    def names(self) -> list[str]:
        """The names of the teachers that rows may have, each once."""
        return list(dict.fromkeys([*self.teachers.values(), *filter(None, [self.default])]))


class FollowedRun(Settings):
    """Another run, whose student is the teacher."""

    run: Annotated[str, StoragePath()]
    """The other run's directory. The run may start later, stop and be resumed; its newest checkpoint counts."""


class TeacherConfig(Settings):
    """A teacher: a named Ray Serve application with one model."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")] = "teacher"
    """The name by which other settings refer to the teacher."""
    model: InputPath | None = None
    """A local model folder or a hub id; with engine kind `openai` the endpoint's name for the model."""
    follows: Literal["student"] | FollowedRun | None = None
    """`student`: the teacher is the student, with weights that follow the training (self-distillation). `model` is left
    out, the engine is `transformers`, and its `dtype: auto` is `training.precision`. `{run: DIRECTORY}`: the teacher is
    the student of another run, with the weights of its newest checkpoint (mutual learning); `model` is what that
    student started from. `null`: the weights are fixed."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """With `follows: student`: the decay d in θ_T ← d·θ_T + (1−d)·θ, by which the teacher's weights θ_T follow the
    student's weights θ; 0 copies them."""
    every: Positive = 1
    """With `follows`: number of optimizer steps from one update of the teacher's weights to the next. With
    `follows: {run: …}`, the other run's newest checkpoint is looked for as often."""
    attach: Annotated[bool, Placement()] = False
    """Use the Serve application `name` that is already running (`rayk serve`), and do not stop it at the end."""
    engine: Annotated[EngineConfig, default_kind("transformers")] = Field(default_factory=TransformersEngineConfig)
    """The engine that runs the model; by default `kind: transformers`."""
    replicas: Annotated[ReplicasConfig, Placement()] = Field(default_factory=Replicas)
    """Number of copies of the model; a single number is the fixed number of copies."""
    resources: Annotated[Resources, Placement()] = Field(default_factory=Resources)
    """Resources of one replica."""
    prompt_template: str | None = None
    """The prompt that this teacher reads instead of the student's, with privileged context: text with {field} names of
    the row, such as its right answer, demonstrations or a document; {prompt} is the student's prompt. Teacher and
    student read the same completion. If the student reads the row in a chat template, the text replaces the last user's
    message, which is {prompt}; system prompt and earlier turns stay. `null`: the student's prompt."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables of the chat template in which this teacher reads the prompts that it writes after (synthesis, referee,
    judge), such as `enable_thinking: false`. For an endpoint, set `engine.extra_body`. Rows whose tokens it scores are
    rendered with `data.chat_template_kwargs`."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    vocab_size: Positive | None = None
    """Number of leading token ids that signals are over; the probability of other tokens is the tail. `null`: all of
    the teacher's tokens; a run sets it for a teacher that has more tokens than the student."""
    call_tokens: Annotated[Positive, Placement()] = 8192
    """Largest number of tokens that are sent to a replica in one call, and that one requester may have in flight at one
    replica."""
    in_flight: Annotated[Positive, Placement()] = 4
    """Number of calls that one requester may have open per running replica."""
    deadline_seconds: Annotated[float, Placement(), Field(gt=0)] = 300.0
    """Longest time in seconds in which the teacher answers none of a requester's requests; then the run stops. While
    the only replica is replaced, twice the time that it took to load is added."""

    @model_validator(mode="after")
    def _check_model(self) -> "TeacherConfig":
        if self.follows is not None:
            self._check_following()
        elif self.ema or self.every > 1:
            raise ValueError("'ema' and 'every' update the weights of a teacher with 'follows'; set it")
        elif self.model is None and not self.attach:
            raise ValueError("needs 'model' (a folder or hub id), or 'attach: true' for a teacher that already runs")
        return self

    def _check_following(self) -> None:
        if self.follows == "student" and (self.model is not None or self.attach):
            raise ValueError("'follows: student' gives the teacher the student's model; leave out 'model' and 'attach'")
        if self.follows != "student" and (self.model is None or self.attach):
            raise ValueError(
                "'follows: {run: …}' needs 'model', from which the other run's student started; 'attach' is left out"
            )
        if self.follows != "student" and self.ema:
            raise ValueError("'ema' averages the weights of this run's student; with 'follows: {run: …}' leave it out")
        if not isinstance(self.engine, TransformersEngineConfig) or self.engine.device_map is not None:
            raise ValueError(
                "'follows' needs engine kind 'transformers' without 'device_map', whose weights can be replaced during "
                "training"
            )

    @model_validator(mode="after")
    def _check_engine(self) -> "TeacherConfig":
        if self.engine.runs_alone and self.replicas.max > 1:
            raise ValueError(
                f"engine kind '{self.engine.kind}' runs in one replica; leave 'replicas' out and raise "
                "engine.concurrency"
            )
        self.engine.check_deadline(self.deadline_seconds)
        spread = isinstance(self.engine, TransformersEngineConfig) and self.engine.device_map is not None
        if spread and self.resources.num_gpus is None:
            raise ValueError(
                "engine.device_map spreads the model over resources.num_gpus GPUs; set resources.num_gpus (0: the CPU)"
            )
        if self.chat_template_kwargs and not self.engine.continues_prompts:
            raise ValueError(
                "chat_template_kwargs: the endpoint renders its chat template itself; if it accepts the variables, set "
                "engine.extra_body: {chat_template_kwargs: {…}}"
            )
        return self

    @property
    def followed_run(self) -> str | None:
        """The directory of the other run whose student the teacher is; None if it is another teacher."""
        return self.follows.run if isinstance(self.follows, FollowedRun) else None

    @property
    def gives_signals(self) -> bool:
        """Return whether the teacher returns signals; otherwise it only generates text."""
        return self.engine.gives_signals


def check_teacher_name(place: str, name: str | None, names: Sequence[str]) -> None:
    """Check that `name`, the value of the setting at `place`, is None or one of the teachers' `names`.

    Raises:
        ValueError: there is no such teacher.
    """
    if name is not None and name not in names:
        raise ValueError(f"{place} '{name}' is none of the teachers ({', '.join(names) or 'there are none'})")
