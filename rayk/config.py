"""Every setting of a run, checked once at the door. Imports neither torch nor ray, so `rayk --help` is instant.

A run's YAML file is one `RunConfig`. Unknown keys are errors that name the nearest right one; `load_config` turns
whatever is wrong into one sentence.
"""

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from rayk.errors import InputError
from rayk.support import Support, TopK

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Settings(BaseModel):
    """Base of every section: no unknown keys, and a misspelt one is told the nearest."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, values: Any) -> Any:
        if isinstance(values, dict):
            unknown = [key for key in values if key not in cls.model_fields]
            if unknown:
                near = difflib.get_close_matches(str(unknown[0]), cls.model_fields, n=1, cutoff=0.5)
                hint = f"did you mean '{near[0]}'?" if near else f"it may hold: {', '.join(cls.model_fields)}."
                raise ValueError(f"unknown key '{unknown[0]}'; {hint}")
        return values


class TransformersEngine(Settings):
    """A transformers causal LM in the replica's own process."""

    kind: Literal["transformers"] = "transformers"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the teacher computes in; `auto` is what its checkpoint was saved in."""
    device: str = "auto"
    """`auto`: the first GPU the replica was given, else the CPU."""
    batch_tokens: Positive = 8192
    """Padded tokens in one forward pass."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads of one replica; by default the replica's `num_cpus`, at least 1."""


class Replicas(Settings):
    """How many copies of a teacher run. `min == max` is a fixed number."""

    min: Positive = 1
    max: Positive = 1

    @model_validator(mode="after")
    def _ordered(self) -> "Replicas":
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is larger than max ({self.max})")
        return self


class Resources(Settings):
    """What Ray sets aside for one replica or worker; fractions share a device."""

    num_cpus: Annotated[float, Field(ge=0)] = 1.0
    num_gpus: Annotated[float, Field(ge=0)] | None = None
    """`null`: one GPU if the cluster has any, else none."""
    custom: dict[str, float] = Field(default_factory=dict)
    """Ray custom resources, for placing on chosen nodes."""


def _replicas(value: Any) -> Any:
    return {"min": value, "max": value} if isinstance(value, int) else value


class TeacherConfig(Settings):
    """A named Serve application with one model behind it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")] = "teacher"
    model: str | None = None
    """A local model folder or a hub id."""
    attach: bool = False
    """Use the Serve application `name` that already runs (`rayk serve`) and leave it running."""
    engine: TransformersEngine = Field(default_factory=TransformersEngine)
    replicas: Annotated[Replicas, BeforeValidator(_replicas)] = Field(default_factory=Replicas)
    resources: Resources = Field(default_factory=Resources)
    trust_remote_code: bool = False
    call_tokens: Positive = 8192
    """Tokens sent to a replica in one call; also what one replica is given at a time by one asker."""
    in_flight: Positive = 8
    """Calls one asker may have open at a time, across all replicas."""
    deadline_seconds: Annotated[float, Field(gt=0)] = 300.0
    """How long one request may take, retries and replica restarts included, before the run stops."""

    @model_validator(mode="after")
    def _has_model(self) -> "TeacherConfig":
        if self.model is None and not self.attach:
            raise ValueError("needs 'model' (a folder or hub id), or 'attach: true' for a teacher that already runs")
        return self


class StudentConfig(Settings):
    """The model that learns: loaded (`model`) or made anew from an architecture (`config`)."""

    model: str | None = None
    """A local model folder or a hub id."""
    config: str | dict[str, Any] | None = None
    """A folder or hub id whose `config.json` is used, or the architecture itself (with its `model_type`); the weights
    start random, from the run's seed. `vocab_size` is taken from the tokenizer where it is not given."""
    tokenizer: str | None = None
    """Folder or hub id; by default the student's own (`model`), or the first teacher's (`config`)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The weights' type; `training.precision` chooses what the step computes in."""
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_origin(self) -> "StudentConfig":
        if (self.model is None) == (self.config is None):
            raise ValueError("needs exactly one of 'model' (load weights) and 'config' (start from random weights)")
        return self


class DataSource(Settings):
    """Where rows come from and how to read them."""

    path: str
    """A .jsonl or .parquet file, a glob, a folder saved by `datasets`, or a hub dataset id."""
    split: str = "train"
    name: str | None = None
    """The configuration of a hub dataset."""
    rows: Positive | None = None
    """Take only the first so many."""
    format: Literal["auto", "prompt_completion", "messages", "text"] = "auto"
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    messages_field: str = "messages"
    text_field: str = "text"
    prompt_template: str | None = None
    """Text with {field} names of the row, instead of `prompt_field`."""
    completion_template: str | None = None
    train_on: Literal["last", "all"] = "last"
    """Which assistant turns of `messages` count."""


class DataConfig(Settings):
    """The rows a run learns from and is measured on."""

    train: DataSource
    evaluation: DataSource | None = None
    max_prompt_tokens: Positive = 1024
    max_tokens: Positive = 2048
    """Longest row, prompt and completion together."""
    too_long: Literal["error", "skip", "truncate"] = "error"
    """What happens to longer rows; `truncate` cuts the completion, never the prompt."""
    chat_template: bool = False
    """Wrap `prompt`/`completion` rows in the tokenizer's chat template."""


DIVERGENCE_OPTIONS: dict[str, tuple[str, ...]] = {
    "forward_kl": (),
    "reverse_kl": (),
    "jensen_shannon": ("beta",),
    "total_variation": (),
    "symmetric_kl": ("weight",),
    "skew_forward_kl": ("alpha",),
    "skew_reverse_kl": ("alpha",),
    "adaptive_kl": ("mu",),
}


class Divergence(Settings):
    """One of `rayk.losses`' divergences with its option; a bare name will do where it has none."""

    name: str = "forward_kl"
    beta: Share | None = None
    weight: Share | None = None
    alpha: Share | None = None
    mu: Share | None = None

    @model_validator(mode="after")
    def _known(self) -> "Divergence":
        if self.name not in DIVERGENCE_OPTIONS:
            near = difflib.get_close_matches(self.name, DIVERGENCE_OPTIONS, n=1, cutoff=0.4)
            hint = f"did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"unknown divergence '{self.name}'; {hint} Known: {', '.join(DIVERGENCE_OPTIONS)}.")
        for option in self.options:
            if option not in DIVERGENCE_OPTIONS[self.name]:
                raise ValueError(f"'{self.name}' takes no '{option}'")
        return self

    @property
    def options(self) -> dict[str, float]:
        """The keyword arguments for the loss function."""
        given = {name: getattr(self, name) for name in ("beta", "weight", "alpha", "mu")}
        return {name: value for name, value in given.items() if value is not None}


class SupervisedConfig(Settings):
    """Cross-entropy on the data's own tokens."""

    kind: Literal["supervised"] = "supervised"


class LogitKDConfig(Settings):
    """The student matches the teacher's distribution at every counted position."""

    kind: Literal["logit_kd"] = "logit_kd"
    teacher: str | None = None
    """Which of `teachers`; by default the first."""
    divergence: Annotated[
        Divergence, BeforeValidator(lambda value: {"name": value} if isinstance(value, str) else value)
    ] = Field(default_factory=Divergence)
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Softmax temperature of both sides in the soft term."""
    temperature_squared: bool = False
    """Multiply the soft term by T² (Hinton's scaling); repositories disagree, see ALGORITHMS §25.11."""
    hard_label_weight: Share = 0.0
    """α in α·cross-entropy + (1−α)·divergence."""
    support: Support = TopK()

    @model_validator(mode="after")
    def _support_carries_temperature(self) -> "LogitKDConfig":
        if not isinstance(self.support, TopK):
            raise ValueError(f"logit_kd cannot learn from support '{self.support.kind}'; use 'topk'")
        if self.temperature not in self.support.temperatures:
            object.__setattr__(self, "support", TopK(self.support.k, (*self.support.temperatures, self.temperature)))
        return self


MethodConfig = Annotated[SupervisedConfig | LogitKDConfig, Field(discriminator="kind")]


class TrainingConfig(Settings):
    """The optimisation and where it runs. The learning result depends on neither `workers` nor `micro_batch_tokens`."""

    workers: Annotated[int, Field(ge=0)] = 1
    """Ray Train workers (data parallel); 0 trains in this very process, without a worker group."""
    resources: Resources = Field(default_factory=Resources)
    threads: Positive | None = None
    """CPU threads of one worker; by default the machine's cores shared out."""
    steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the data; give this or `steps`."""
    batch_size: Positive = 32
    """Rows of one optimiser step, over all workers."""
    micro_batch_tokens: Positive = 8192
    """Padded tokens a worker holds at a time; gradients are accumulated."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    final_learning_rate: Share = 0.0
    """What the schedule ends at, as a share of `learning_rate`."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16`: autocast of the step; weights and losses stay as they are."""
    prefetch: Positive = 4
    """Batches prepared ahead of the step (teacher asked, rollouts made)."""
    checkpoint_every_steps: Positive = 100
    keep_checkpoints: Positive = 2
    checkpoints: str | None = None
    """Where checkpoints go: a folder or a URI (s3://…, gs://…); by default OUTPUT/checkpoints."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Worker-group restarts before the run gives up; -1 for no limit."""
    collective_timeout_seconds: Annotated[float, Field(gt=0)] = 1800.0
    """Longer than any teacher's deadline: the ranks must hear of it, not time out."""

    @model_validator(mode="after")
    def _consistent(self) -> "TrainingConfig":
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give 'steps' or 'epochs', not both")
        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "epochs", 1.0)
        if self.batch_size < self.workers:
            raise ValueError(f"'batch_size' ({self.batch_size}) is below 'workers' ({self.workers})")
        return self


class GenerationConfig(Settings):
    """How the student answers evaluation prompts."""

    max_new_tokens: Positive = 128
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0: greedy."""
    rows: Positive | None = None
    """Only the first so many evaluation rows."""


class EvaluationConfig(Settings):
    """Measuring on held-out rows: loss, distance to the teacher, and the task itself."""

    every_steps: Positive | None = None
    """Loss and divergences this often; always at the end."""
    support: Support = TopK()
    """What the teacher is asked for the divergences."""
    generation: GenerationConfig | None = None
    """Also answer the prompts and score the answers; `null` measures only losses."""
    answer_field: str | None = None
    """The row's field with the truth; by default the completion."""
    answer_pattern: str | None = None
    """A regular expression with one group that finds the answer in both texts (the last match counts), such as
    '#### (.+)'; by default the whole text, white space folded."""
    samples: Annotated[int, Field(ge=0)] = 8
    """Completions kept for the report."""

    @field_validator("answer_pattern")
    @classmethod
    def _has_one_group(cls, pattern: str | None) -> str | None:
        if pattern is None:
            return None
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"is not a regular expression: {error}") from error
        if groups != 1:
            raise ValueError(f"needs exactly one group, it has {groups}")
        return pattern


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
    student: StudentConfig
    data: DataConfig
    method: MethodConfig
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    @model_validator(mode="after")
    def _parts_fit(self) -> "RunConfig":
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) < len(names):
            raise ValueError(f"teachers: two share a name ({', '.join(names)})")
        wanted = getattr(self.method, "teacher", None)
        if isinstance(self.method, LogitKDConfig) and not names:
            raise ValueError("method.kind 'logit_kd' needs a teacher; add one under 'teachers'")
        if wanted is not None and wanted not in names:
            raise ValueError(f"method.teacher '{wanted}' is none of the teachers ({', '.join(names)})")
        for teacher in self.teachers:
            if teacher.deadline_seconds >= self.training.collective_timeout_seconds:
                raise ValueError(
                    f"teacher '{teacher.name}': deadline_seconds must be below training.collective_timeout_seconds "
                    f"({self.training.collective_timeout_seconds:g})"
                )
        if self.evaluation.generation and not self.data.evaluation:
            raise ValueError("evaluation.generation needs rows: set data.evaluation")
        return self

    @property
    def output_path(self) -> Path:
        return Path(self.output or f"runs/{self.name}").expanduser().absolute()

    def to_yaml(self) -> str:
        """The resolved settings, as `rayk run` reads them."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_config(path: str | os.PathLike, overrides: list[str] | None = None, **fields: Any) -> RunConfig:
    """Read a YAML file, apply `a.b=value` overrides (list items by number) and top-level `fields`, and check it all.

    Raises:
        InputError: one sentence on the first thing that is wrong.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"The config file '{path}' cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"The config file '{path}' is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InputError(f"The config file '{path}' is empty or holds no settings; see jobs/ for examples.")
    for override in overrides or []:
        _apply_override(values, override)
    values.update({name: value for name, value in fields.items() if value is not None})
    return parse_config(values, where=str(path))


def parse_config(values: dict[str, Any], where: str = "The config") -> RunConfig:
    """Check settings given as a dict; errors as `load_config`."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{where}: {_sentence(error)}") from error


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InputError(f"--set {override}: write it as a.b=value.")
    *parents, last = key.split(".")
    place: Any = values
    try:
        for part in parents:
            if isinstance(place, list):
                place = place[int(part)]
            else:
                if place.get(part) is None:
                    place[part] = {}
                place = place[part]
                if not isinstance(place, dict | list):
                    raise TypeError
        value = yaml.safe_load(text)
        if isinstance(place, list):
            place[int(last)] = value
        else:
            place[last] = value
    except (TypeError, ValueError, IndexError, yaml.YAMLError) as error:
        raise InputError(f"--set {override}: there is no such place in the config.") from error


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    # Union branches put the branch's name in the location; a user knows only the keys.
    kinds = {"supervised", "logit_kd", "topk", "logprob"}
    place = ".".join(str(part) for part in first["loc"] if part not in kinds)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        message = "is missing; set it"
    elif first["type"] == "union_tag_invalid":
        tag = first["ctx"]["tag"]
        known = re.findall(r"'([^']+)'", first["ctx"]["expected_tags"])
        near = difflib.get_close_matches(tag, known, n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'? " if near else ""
        message = f"unknown kind '{tag}'; {hint}Known: {', '.join(known)}"
    elif first["type"] == "union_tag_not_found":
        message = "needs a 'kind'"
    elif first["type"] in ("dataclass_unexpected_keyword", "unexpected_keyword_argument", "extra_forbidden"):
        message = f"unknown key '{first['loc'][-1]}'"
        place = ".".join(place.split(".")[:-1])
    elif first["type"] != "value_error":  # pydantic's own words, not ours
        message = f"{message[0].lower()}{message[1:]} (it is {first['input']!r})"
    joint = " " if message.startswith(("is ", "needs ", "takes ")) else ": "
    sentence = f"{place}{joint}{message}" if place else message
    return sentence if sentence.endswith((".", "?")) else f"{sentence}."
