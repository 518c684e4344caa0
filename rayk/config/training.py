"""Who learns, and how: the student and the optimisation."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from rayk.config.base import Positive, Settings, Share
from rayk.config.teachers import Resources


def _all_or_named(value: Any) -> Any:
    if value != "all-linear" and not (
        isinstance(value, list) and value and all(isinstance(each, str) for each in value)
    ):
        raise ValueError(f"is {value!r}; it may be 'all-linear' or a list of modules, such as [q_proj, v_proj]")
    return value


class LoraConfig(Settings):
    """Train an adapter on frozen weights (`rayk.models.lora`); needs `pip install 'rayk[lora]'`."""

    r: Positive = 16
    """The rank: how many directions of each weight learn."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The adapter's output counts alpha/r times."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of what the adapter reads, in training steps alone."""
    target_modules: Annotated[Literal["all-linear"] | list[str], BeforeValidator(_all_or_named)] = "all-linear"
    """The modules that get an adapter, by the end of their names (`[q_proj, v_proj]`); `all-linear`: all linear layers
    but the head."""
    modules_to_save: list[str] = Field(default_factory=list)
    """Modules that learn whole, by the end of their names, in the student's `dtype`."""

    @model_validator(mode="after")
    def _one_way_each(self) -> "LoraConfig":
        both = [] if isinstance(self.target_modules, str) else set(self.target_modules) & set(self.modules_to_save)
        if both:
            raise ValueError(f"'{min(both)}' is in both target_modules and modules_to_save; leave it out of one")
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
    lora: LoraConfig | None = None
    """Learn an adapter on the loaded weights, which stay as they are; `null`: learn all weights."""
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_origin(self) -> "StudentConfig":
        if (self.model is None) == (self.config is None):
            raise ValueError("needs exactly one of 'model' (load weights) and 'config' (start from random weights)")
        if self.lora is not None and self.model is None:
            raise ValueError("'lora' adapts trained weights, but 'config' starts from random ones; leave one out")
        return self


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
    unusable_rows: Literal["stop", "skip"] = "stop"
    """What happens to a row whose signal cannot be learned from (NaN, infinities, rewards and ratios beyond a method's
    limits): it is named and the run stops, or it is named, left out and counted."""
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
            raise ValueError("give 'steps' or 'epochs', not both; set the other to null")
        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "epochs", 1.0)
        if self.batch_size < self.workers:
            raise ValueError(f"'batch_size' ({self.batch_size}) is below 'workers' ({self.workers})")
        return self
