"""Settings of the student and of the optimization."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from rayk.config.base import InputPath, Placement, Positive, Settings, Share, StoragePath
from rayk.config.teachers import Resources


def _check_modules(value: Any) -> Any:
    is_list = isinstance(value, list) and value and all(isinstance(name, str) for name in value)
    if value != "all-linear" and not is_list:
        raise ValueError(f"is {value!r}; it may be 'all-linear' or a list of modules, such as [q_proj, v_proj]")
    return value


class LoraConfig(Settings):
    """Train a LoRA adapter on frozen weights; needs `pip install 'rayk[lora]'`."""

    r: Positive = 16
    """Rank of the adapter."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The adapter's output is multiplied by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability of the adapter's input during training."""
    target_modules: Annotated[Literal["all-linear"] | list[str], BeforeValidator(_check_modules)] = "all-linear"
    """The modules that get an adapter, by the last part of their names (`[q_proj, v_proj]`); `all-linear`: all linear
    layers except the head, the experts of a mixture (with layers of the same names, such as shared experts), and those
    of a Mamba layer whose weights its kernel reads directly."""
    modules_to_save: list[str] = Field(default_factory=list)
    """Modules that are trained in full, by the last part of their names."""

    @model_validator(mode="after")
    def _check_disjoint(self) -> "LoraConfig":
        both = [] if isinstance(self.target_modules, str) else set(self.target_modules) & set(self.modules_to_save)
        if both:
            raise ValueError(f"'{min(both)}' is in both target_modules and modules_to_save; leave it out of one")
        return self


class StudentConfig(Settings):
    """The model that is trained: loaded (`model`), or created with random weights (`config`)."""

    model: InputPath | None = None
    """A local model folder or a hub id; `null`: the student is created from `config`."""
    config: InputPath | dict[str, Any] | None = None
    """The architecture of a student with random weights, drawn from the run's seed: a folder or hub id whose
    `config.json` is used, or its content (with `model_type`). `vocab_size` is the tokenizer's if not given."""
    layers: Positive | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    """Cut the student from `model`: keep that many of its layers, spread evenly with the first and the last, or the
    listed ones (numbered from 0), in this order. `null`: all layers."""
    tokenizer: InputPath | None = None
    """Folder or hub id of the tokenizer; `null`: the tokenizer of `model`, or with `config` that of the first
    teacher."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The type of the frozen weights of a student with `lora`. Trained weights are always float32, because updates
    smaller than the rounding of bfloat16 would be lost: without `lora`, or with `lora.modules_to_save`, `bfloat16` sets
    `training.precision`, the type of the computation, to `bfloat16`."""
    save_dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], Placement()] = "auto"
    """The type of the weights in OUTPUT/model; `auto`: that of the checkpoint in `model`, or `dtype` with `config`.
    Checkpoints of the run and an adapter's own folder contain float32."""
    save_to: Annotated[str | None, StoragePath(), Placement()] = None
    """Folder or URI (s3://…, gs://…) to which OUTPUT/model is copied at the end of the run, and an adapter to the same
    name with `-adapter`; it must be empty at the start. `null`: no copy."""
    lora: LoraConfig | None = None
    """Train only an adapter on the loaded weights; `null`: all weights are trained."""
    attention: Annotated[str | None, Placement()] = None
    """transformers' `attn_implementation`, such as `flash_attention_2`; `null`: `sdpa`, or `eager` for models with a
    soft-cap on attention scores (Gemma 2). Rows of different lengths are packed with `null` only."""
    gradient_checkpointing: Annotated[bool, Placement()] = False
    """Recompute activations in the backward pass, to save memory."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    @model_validator(mode="after")
    def _check_origin(self) -> "StudentConfig":
        if (self.model is None) == (self.config is None):
            raise ValueError("needs exactly one of 'model' (load weights) and 'config' (start from random weights)")
        if self.lora is not None and self.model is None:
            raise ValueError("'lora' adapts trained weights, but 'config' starts from random ones; leave one out")
        if self.layers is not None and self.model is None:
            raise ValueError("'layers' cuts a trained model, but 'config' starts from random weights; leave one out")
        if isinstance(self.layers, list) and len(set(self.layers)) < len(self.layers):
            raise ValueError(f"'layers' lists a layer twice ({self.layers}); list each once")
        return self


class WorkerRange(Settings):
    """A number of workers that follows the cluster: as many as it has room for."""

    min: Positive
    """Smallest number of workers; with fewer, the run waits."""
    max: Positive
    """Largest number of workers."""

    @model_validator(mode="after")
    def _check_range(self) -> "WorkerRange":
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is larger than max ({self.max})")
        return self


Workers = Annotated[
    Annotated[int, Field(ge=0), Tag("int")] | Annotated[WorkerRange, Tag("[range]")],
    Discriminator(
        lambda value: "[range]" if isinstance(value, dict | WorkerRange) else "int"
    ),  # for one error, not two
]


class TrainingConfig(Settings):
    """The optimization and where it runs. The trained weights depend on neither `workers` nor `micro_batch_tokens`,
    except through dropout, whose masks are drawn for each worker and forward pass. Methods that compare log-probs with
    those of the same weights use no dropout (`minillm`, `preference`, `on_policy` with `form: policy`)."""

    workers: Annotated[Workers, Placement()] = 1
    """Number of Ray Train workers (data parallel); 0 trains in this process, without a worker group. With
    `{min: 2, max: 8}` there are as many as the cluster has room for. When nodes come or go, the workers start again
    from the latest checkpoint in their new number, and learn the same."""
    resources: Annotated[Resources, Placement()] = Field(default_factory=Resources)
    """Resources of one worker."""
    threads: Annotated[Positive | None, Placement()] = None
    """CPU threads of one worker; `null`: the machine's cores divided by its workers."""
    steps: Positive | None = None
    """Number of optimizer steps; `null`: given by `epochs`."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Number of passes over the data, instead of `steps`; 1 if neither is given."""
    batch_size: Positive = 32
    """Rows per optimizer step, over all workers."""
    micro_batch_tokens: Annotated[Positive, Placement()] = 8192
    """Tokens per forward pass of one worker, padding included; gradients are accumulated. The rows of one pair, or the
    options of one query, are computed in parts if they have more together."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of AdamW; `null`: the method's default, which is 1e-6 for `preference` (1e-5 with
    `student.lora`), 5e-6 for `minillm` (5e-5 with `student.lora`), and 1e-4 for other methods."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """The shape of the learning rate after the warmup."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Number of steps over which the learning rate rises linearly from 0; `null`: given by `warmup_share`."""
    warmup_share: Share | None = None
    """The warmup as a share of the run's steps, instead of `warmup_steps`; `null`: the method's default, which is 0.1
    for `preference` and 0.03 for other methods."""
    final_learning_rate: Share = 0.0
    """Learning rate at the end of the schedule, as a share of `learning_rate`."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """AdamW's decay rates β₁ and β₂ of the two moments."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Norm to which the gradient is clipped; `null`: no clipping."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """The type of the computation; `bfloat16` is autocast: the weights keep their type, and losses are float32."""
    prefetch: Annotated[Positive, Placement()] = 4
    """Number of batches that are prepared ahead of the step: their rollouts generated and teachers queried."""
    unusable_rows: Literal["stop", "skip"] = "stop"
    """Handling of a row that cannot be trained on (NaN or infinite signals, rewards or ratios above a method's limits):
    the run stops and names the row, or the row is named, skipped and counted."""
    checkpoint_every_steps: Annotated[Positive, Placement()] = 100
    """Number of steps between two checkpoints."""
    checkpoint_every_minutes: Annotated[float | None, Placement(), Field(gt=0)] = None
    """Longest time between two checkpoints, beside `checkpoint_every_steps`; `null`: no limit. The run is also
    checkpointed when Ray announces that a worker's node goes away."""
    keep_checkpoints: Annotated[Positive, Placement()] = 2
    """Number of latest checkpoints to keep."""
    checkpoints: Annotated[str | None, StoragePath(), Placement()] = None
    """Folder or URI (s3://…, gs://…) of the checkpoints; `null`: OUTPUT/checkpoints."""
    max_failures: Annotated[int, Placement(), Field(ge=-1)] = 3
    """Number of restarts of failed workers before the run stops; -1: no limit. After a new checkpoint they are counted
    anew, so that only failures without progress stop a long run."""
    collective_timeout_seconds: Annotated[float, Placement(), Field(gt=0)] = 1800.0
    """Longest time in seconds that workers wait for each other; it must be above every teacher's deadline."""
    sharding: Annotated[Literal["none", "fsdp", "hsdp"], Placement()] = "none"
    """Division of the student's weights, gradients and optimizer state among the workers: `none` (each worker has all
    of them: DDP), `fsdp` (among all workers), or `hsdp` (among `shards` workers, with a copy in each such group)."""
    shards: Annotated[Positive | None, Placement()] = None
    """With `sharding: hsdp`, the number of workers that share one copy of the weights; `null`: those of a node."""
    reshard: Annotated[Literal["last", "always"], Placement()] = "last"
    """With `sharding`, when a worker frees the weights of other workers: after the `last` micro-batch of a step, or
    `always` after each use, which needs the least memory and communicates for each micro-batch."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """The optimizer: AdamW with moments in float32 (8 bytes a trained weight), or torchao's AdamW with moments in 8
    bits (2 bytes), which needs `pip install 'rayk[torchao]'`. Weights are float32 with both."""
    compile: Annotated[bool, Placement()] = False
    """Compile the student's layers with `torch.compile` for training. The first steps then take longer, by minutes on a
    CPU; results differ by rounding. Attention of packed rows, head and loss are not compiled."""

    @model_validator(mode="after")
    def _check_length(self) -> "TrainingConfig":
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give 'steps' or 'epochs', not both; set the other to null")
        if self.warmup_steps is not None and self.warmup_share is not None:
            raise ValueError("give 'warmup_steps' or 'warmup_share', not both; set the other to null")
        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "epochs", 1.0)
        if self.batch_size < self.most_workers:
            raise ValueError(f"'batch_size' ({self.batch_size}) is below 'workers' ({self.most_workers})")
        return self

    @property
    def least_workers(self) -> int:
        """The smallest number of workers; 0 if the run trains in its own process."""
        return self.workers if isinstance(self.workers, int) else self.workers.min

    @property
    def most_workers(self) -> int:
        """The largest number of workers; 0 if the run trains in its own process."""
        return self.workers if isinstance(self.workers, int) else self.workers.max

    @model_validator(mode="after")
    def _check_sharding(self) -> "TrainingConfig":
        if self.sharding != "none" and self.workers == 0:
            raise ValueError("'sharding' divides the weights among workers, but 'workers' is 0; set it to 1 or more")
        if self.shards is not None and self.sharding != "hsdp":
            raise ValueError("'shards' is the size of a group with 'sharding: hsdp'; leave it out")
        if self.sharding == "hsdp" and self.least_workers < self.most_workers:
            raise ValueError("'sharding: hsdp' needs a fixed number of 'workers'; set it, or use 'fsdp'")
        if self.shards is not None and self.most_workers % self.shards:
            raise ValueError(f"'workers' ({self.most_workers}) is not a multiple of 'shards' ({self.shards})")
        return self

    @model_validator(mode="after")
    def _check_unsharded(self) -> "TrainingConfig":
        if self.optimizer == "adamw_8bit" and self.sharding != "none":
            raise ValueError("'optimizer: adamw_8bit' has not been tested with 'sharding'; leave one out")
        return self
