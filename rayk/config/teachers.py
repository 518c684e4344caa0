"""Who teaches: the model, the engine that runs it, and how many copies of it."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from rayk.config.base import ClassPath, Positive, Settings
from rayk.config.support import Hidden, Logprob, Requested, Sampled, Support, TopK


class LocalEngineConfig(Settings):
    """What engines in the replica's own process have in common."""

    device: str = "auto"
    """`auto`: the first GPU the replica was given, else the CPU."""
    batch_tokens: Positive = 8192
    """Padded tokens in one forward pass."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads of one replica; by default the replica's `num_cpus`, at least 1."""


class TransformersEngineConfig(LocalEngineConfig):
    """A transformers causal LM in the replica's own process."""

    kind: Literal["transformers"] = "transformers"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the teacher computes in; `auto` is what its checkpoint was saved in."""


class OnVLLM(Settings):
    """vLLM's asynchronous engine in a process beside the replica's own, or several of them.

    A replica asks Ray for `tensor_parallel_size` GPUs of one node unless `resources.num_gpus` says otherwise, and vLLM
    runs a process on each.
    """

    kind: Literal["vllm"] = "vllm"
    tensor_parallel_size: Positive = 1
    max_model_len: Annotated[int, Field(ge=2)] | None = None
    """Longest sequence, prompt and continuation together; by default what the model takes. The cache must hold one."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of each GPU's memory one engine takes; by default vLLM's. On a CPU, of the machine's memory; by default
    the cache has 1 GiB there."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Anything else for vLLM's `AsyncEngineArgs`, under its names there."""


class VLLMEngineConfig(OnVLLM):
    """vLLM: fast, on one or more GPUs of a node; top-k signals at temperature 1."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto` is vLLM's choice: as saved, but 16 bits for a checkpoint in float32."""
    across_nodes: bool = False
    """The GPUs of one copy may lie on several nodes: a replica asks Ray for a placement group, one GPU a bundle, on as
    few nodes as it takes, and vLLM's processes are Ray's. For models that no node holds."""
    hidden: bool = False
    """Also give support `hidden`. vLLM needs a second engine for it, which loads the model once more: keep
    `gpu_memory_utilization` below a half, with room for the head."""

    @model_validator(mode="after")
    def _one_engine_across_nodes(self) -> "VLLMEngineConfig":
        if self.across_nodes and self.hidden:
            raise ValueError("'across_nodes' has GPUs for one engine, but 'hidden' needs a second; leave one out")
        return self


class SimulatedEngineConfig(Settings):
    """Answers of the real size after the time a real teacher would take; no weights. For planning capacity."""

    kind: Literal["simulated"] = "simulated"
    tokens_per_second: Annotated[float, Field(gt=0)] = 10_000.0
    """What one replica scores."""
    generated_tokens_per_second: Annotated[float, Field(gt=0)] = 1_000.0
    latency_seconds: Annotated[float, Field(ge=0)] = 0.0
    """Added to each request, while others are computed."""
    start_seconds: Annotated[float, Field(ge=0)] = 0.0
    """How long a replica takes until it answers."""


class OpenAIEngineConfig(Settings):
    """An OpenAI-compatible endpoint as a black box: prompts go in as text, text comes out, and there are no signals.

    One replica asks for everybody, so that the limits and the count of what was paid hold for the whole teacher. The
    key stays in the environment of the process that asks.
    """

    kind: Literal["openai"] = "openai"
    base_url: Annotated[str, Field(pattern=r"^https?://[^@?#\s]+$")] = "https://api.openai.com/v1"
    """Without a user, password or query: settings are written into the run directory."""
    model_name: str | None = None
    """What the endpoint calls the model; by default the teacher's `model`."""
    api_key_variable: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = "OPENAI_API_KEY"
    """The environment variable, set where the replica runs, that holds the key; `null` for an endpoint without keys."""
    chat: bool = True
    """Ask for chat completions, each prompt as a user's message; else for plain completions."""
    length_parameter: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What `max_new_tokens` is called in chat; OpenAI's newer models know only `max_completion_tokens`."""
    logprobs: bool = False
    """Also ask for the log-probs of the written tokens, as the endpoint computes them."""
    concurrency: Positive = 16
    """Prompts asked at a time."""
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    """Retries count too; `null`: no limit. The prompts that askers have in flight must get through within
    `deadline_seconds`."""
    tokens_per_minute: Annotated[float, Field(gt=0)] | None = None
    """Prompts and completions together; `null`: no limit."""
    attempts: Positive = 5
    """How often one prompt is asked before it is given up."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 60.0
    """For one answer."""
    price_per_million_prompt_tokens: Annotated[float, Field(ge=0)] | None = None
    """In any currency; with both prices the cost is counted."""
    price_per_million_completion_tokens: Annotated[float, Field(ge=0)] | None = None


class CustomEngineConfig(Settings):
    """An engine of your own: a class with the methods of `rayk.engines.base.Engine`, called with (model, settings,
    trust_remote_code)."""

    kind: Literal["custom"] = "custom"
    path: ClassPath
    """The engine's class as 'module:name', or the name of an entry point in group `rayk.engines`. The module may also
    be a file in the folder where rayk was started."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Passed to the engine as `settings.options`."""
    signals: bool = True
    """Whether it returns signals; else it only generates text."""


def on_transformers(value: Any) -> Any:
    """An engine whose `kind` is left out runs on transformers."""
    return {"kind": "transformers"} | value if isinstance(value, dict) else value


EngineConfig = Annotated[
    TransformersEngineConfig | VLLMEngineConfig | OpenAIEngineConfig | SimulatedEngineConfig | CustomEngineConfig,
    Field(discriminator="kind"),
]


def check_engine_gives(engine: EngineConfig, support: Support) -> None:
    """Refuse a support that this engine is known not to have.

    Raises:
        ValueError: the sentence says what does.
    """
    if engine.kind == "vllm":
        if isinstance(support, Hidden) and not engine.hidden:
            raise ValueError("support 'hidden' on vLLM needs a second engine; set 'engine.hidden: true'")
        if isinstance(support, Sampled):
            raise ValueError("vLLM cannot draw at the positions of a prompt; use 'topk', or engine kind 'transformers'")
        if isinstance(support, TopK | Requested) and set(support.temperatures) != {1.0}:
            raise ValueError(
                "vLLM tells log-probs at temperature 1 only; use support 'hidden', or engine kind 'transformers'"
            )
    if engine.kind == "simulated" and not isinstance(support, TopK | Logprob):
        raise ValueError(f"the simulated engine has no support '{support.kind}'; use 'topk'")


class Replicas(Settings):
    """How many copies of a teacher run. `min == max` is a fixed number, else it follows what is waited for."""

    min: Annotated[int, Field(ge=0)] = 1
    """0: none while nobody asks."""
    max: Positive = 1
    waiting_tokens: Positive = 16_384
    """Tokens that askers wait for, a replica: with more of them another one is started."""
    up_seconds: Annotated[float, Field(ge=0)] = 5.0
    """How long more replicas must be wanted before they are started; fewer, before one is stopped: `down_seconds`."""
    down_seconds: Annotated[float, Field(ge=0)] = 60.0

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


def as_replicas(value: Any) -> Any:
    """`replicas: 2` is short for as many at least and at most."""
    return {"min": value, "max": value} if isinstance(value, int) else value


class EnsembleConfig(Settings):
    """Several teachers that are asked as one."""

    teachers: list[str] = Field(default_factory=list)
    """Their names; by default all of `teachers`."""
    combine: Literal["probabilities", "logits"] = "probabilities"
    """The mean of what; `logits` as in BabyLlama (arXiv 2308.02019)."""
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Each teacher's share in the mean, by name; 1 where not given. They need not sum to 1."""


class RouteConfig(Settings):
    """A teacher for each row, by one of its fields."""

    field: str
    teachers: dict[str, str]
    """The teacher's name (or 'ensemble') for each value of the field."""
    default: str | None = None
    """Who teaches rows with any other value; without it such a row is an error."""


class TeacherConfig(Settings):
    """A named Serve application with one model behind it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")] = "teacher"
    model: str | None = None
    """A local model folder or a hub id; with engine kind `openai` the endpoint's name for it."""
    attach: bool = False
    """Use the Serve application `name` that already runs (`rayk serve`) and leave it running."""
    engine: Annotated[EngineConfig, BeforeValidator(on_transformers)] = Field(default_factory=TransformersEngineConfig)
    """By default `kind: transformers`."""
    replicas: Annotated[Replicas, BeforeValidator(as_replicas)] = Field(default_factory=Replicas)
    resources: Resources = Field(default_factory=Resources)
    prompt_template: str | None = None
    """What this teacher reads instead of the student's prompt: text with {field} names of the row, such as the answer.
    Both see the same completion."""
    trust_remote_code: bool = False
    call_tokens: Positive = 8192
    """Tokens sent to a replica in one call; also what one replica is given at a time by one asker."""
    in_flight: Positive = 4
    """Calls one asker may have open at a time for each replica that runs."""
    deadline_seconds: Annotated[float, Field(gt=0)] = 300.0
    """How long one request may take, retries and replica restarts included, before the run stops."""

    @model_validator(mode="after")
    def _has_model(self) -> "TeacherConfig":
        if self.model is None and not self.attach:
            raise ValueError("needs 'model' (a folder or hub id), or 'attach: true' for a teacher that already runs")
        return self

    @model_validator(mode="after")
    def _endpoint_fits(self) -> "TeacherConfig":
        if not isinstance(self.engine, OpenAIEngineConfig):
            return self
        if self.replicas.max > 1:
            raise ValueError(
                "engine kind 'openai' runs in one replica; leave 'replicas' out and raise engine.concurrency"
            )
        if self.engine.timeout_seconds >= self.deadline_seconds:
            raise ValueError(f"engine.timeout_seconds must be below deadline_seconds ({self.deadline_seconds:g})")
        return self

    @property
    def gives_signals(self) -> bool:
        """Whether it can be asked for more than text."""
        if isinstance(self.engine, CustomEngineConfig):
            return self.engine.signals
        return not isinstance(self.engine, OpenAIEngineConfig)
