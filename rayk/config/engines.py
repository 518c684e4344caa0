"""Settings of the engines that run a model, with the capabilities of each engine."""

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from rayk.config.base import ClassPath, Dtype, Placement, Positive, Settings
from rayk.config.support import Layers, Logprob, Support, TopK

_BODY_FIELDS = {
    "model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop",
    "logprobs", "n", "stream",
}  # fmt: skip


class EngineSettings(Settings):
    """Base of all engines' settings. Its attributes tell the other sections what the engine can do."""

    runs_alone: ClassVar[bool] = False
    """True if a teacher on this engine has exactly one replica."""
    verifies_drafts: ClassVar[bool] = False
    """True if the engine can verify drafts of the student, which teacher-mixed sampling requires."""
    applies_chat_template: ClassVar[bool] = False
    """True if the engine itself wraps prompts in a chat template."""
    counts_tokens: ClassVar[bool] = True
    """True if the engine returns token ids with the text that it generates."""

    @property
    def gives_signals(self) -> bool:
        """Return whether the engine returns signals; otherwise it only generates text."""
        return True

    @property
    def continues_prompts(self) -> bool:
        """Return whether the engine continues a prompt exactly as given; otherwise it adds a chat template."""
        return True

    @property
    def generates_logprobs(self) -> bool:
        """Return whether the engine returns the log-probs of the tokens that it generates."""
        return True

    @property
    def gpus(self) -> float:
        """GPUs of one replica, unless `resources.num_gpus` is set."""
        return 1.0

    @property
    def spans_nodes(self) -> bool:
        """Return whether the GPUs of one replica may be on several nodes."""
        return False

    @property
    def simulated_rate(self) -> float | None:
        """Tokens per second that one replica scores, if the engine is simulated; else None."""
        return None

    def check_support(self, support: Support) -> None:
        """Check that the engine returns this support.

        Raises:
            ValueError: the engine does not; the message names an alternative.
        """

    def check_deadline(self, deadline_seconds: float) -> None:
        """Check that one request can end before the teacher's deadline.

        Raises:
            ValueError: the engine's own time limit is not below the deadline.
        """


class LocalEngineConfig(EngineSettings):
    """Base of engines that compute in the replica's own process."""

    device: Annotated[str, Placement()] = "auto"
    """The device to compute on; `auto`: the first GPU of the replica, or the CPU if it has none."""
    batch_tokens: Annotated[Positive, Placement()] = 8192
    """Tokens in one forward pass, padding included."""
    threads: Annotated[Positive | None, Placement()] = None
    """CPU threads of one replica; `null`: its `resources.num_cpus`, at least 1."""


class TransformersEngineConfig(LocalEngineConfig):
    """A causal language model of transformers in the replica's own process."""

    verifies_drafts: ClassVar[bool] = True

    kind: Literal["transformers"] = "transformers"
    """The engine's kind."""
    dtype: Dtype = "auto"
    """The type of weights and computation; `auto`: the type that the checkpoint was saved in."""
    device_map: Annotated[Literal["auto", "balanced", "balanced_low_0", "sequential"] | None, Placement()] = None
    """Spread the layers over the `resources.num_gpus` GPUs of the replica, which compute one after another: for models
    that do not fit on one GPU. The names are transformers'; `null`: all layers on `device`."""
    stall_seconds: Annotated[float, Placement(), Field(gt=0)] = 300.0
    """Longest time of one forward pass in seconds; then the replica hangs and is replaced."""

    @model_validator(mode="after")
    def _check_devices(self) -> "TransformersEngineConfig":
        if self.device_map is not None and self.device != "auto":
            raise ValueError("'device_map' chooses the device of each layer; leave 'device' out")
        return self


class VLLMSettings(EngineSettings):
    """Base of the vLLM engines: vLLM's asynchronous engine in one or more processes of its own.

    A replica requests `tensor_parallel_size` · `pipeline_parallel_size` · `data_parallel_size` GPUs of one node from
    Ray, unless `resources.num_gpus` is set; vLLM runs one process on each GPU.
    """

    kind: Literal["vllm"] = "vllm"
    """The engine's kind."""
    tensor_parallel_size: Annotated[Positive, Placement()] = 1
    """Number of GPUs that share each layer of the model."""
    pipeline_parallel_size: Annotated[Positive, Placement()] = 1
    """Number of groups of GPUs that each have some of the layers."""
    data_parallel_size: Annotated[Positive, Placement()] = 1
    """Number of copies of the attention layers in one replica, for a mixture of experts whose experts are spread over
    all GPUs (`expert_parallel`). Copies of a whole model are `replicas`."""
    expert_parallel: Annotated[bool, Placement()] = False
    """Give each GPU some of the experts of a mixture of experts, instead of a part of every expert."""
    max_model_len: Annotated[int, Field(ge=2)] | None = None
    """Longest sequence in tokens, prompt and completion together; `null`: the model's own limit. The KV cache must have
    room for one such sequence."""
    gpu_memory_utilization: Annotated[float | None, Placement()] = Field(default=None, gt=0, le=1)
    """Share of each GPU's memory that one engine takes; `null`: vLLM's default. On a CPU it is a share of the machine's
    memory, and `null` gives the KV cache 1 GiB."""
    stall_seconds: Annotated[float, Placement(), Field(gt=0)] = 300.0
    """Longest time in seconds in which vLLM's processes do not react between two steps; then they hang, and the replica
    is replaced."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Other arguments of vLLM's `AsyncEngineArgs`, by name."""

    def check_support(self, support: Support) -> None:
        if isinstance(support, Layers):
            raise ValueError("the vLLM engine returns no states of layers; use engine kind 'transformers'")

    @property
    def gpus(self) -> float:
        return float(self.tensor_parallel_size * self.pipeline_parallel_size * self.data_parallel_size)

    @model_validator(mode="after")
    def _check_parallelism(self) -> "VLLMSettings":
        if "worker_extension_cls" in self.arguments:
            raise ValueError("'worker_extension_cls' in 'arguments' is set by rayk; leave it out")
        if "trust_remote_code" in self.arguments:
            raise ValueError(
                "'trust_remote_code' in 'arguments' would overrule the setting of that name at the teacher or student; "
                "set that one instead"
            )
        for argument, setting in _PARALLEL_ARGUMENTS.items():
            if argument in self.arguments:
                raise ValueError(
                    f"'{argument}' in 'arguments' is not counted in the GPUs of a replica; set '{setting}' instead"
                )
        if self.expert_parallel and self.tensor_parallel_size * self.data_parallel_size == 1:
            raise ValueError(
                "'expert_parallel' spreads the experts over tensor_parallel_size · data_parallel_size GPUs, which is "
                "1; raise one of them"
            )
        return self


_PARALLEL_ARGUMENTS = {
    "tensor_parallel_size": "tensor_parallel_size", "pipeline_parallel_size": "pipeline_parallel_size",
    "data_parallel_size": "data_parallel_size", "enable_expert_parallel": "expert_parallel",
}  # fmt: skip


class VLLMEngineConfig(VLLMSettings):
    """vLLM: fast, on one or more GPUs. Signals are computed in vLLM's own processes."""

    dtype: Dtype = "auto"
    """The type of weights and computation; `auto`: the type of the checkpoint, or a 16-bit type if that is float32."""
    quantization: Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")] | None = None
    """vLLM's name of the way in which weights are quantized, such as `fp8`, which also quantizes the weights of a
    16-bit checkpoint; `null`: as the checkpoint says."""
    batch_tokens: Annotated[Positive | None, Placement()] = None
    """Tokens in one forward pass; `null`: 16,384 on a GPU, vLLM's default on a CPU."""
    max_sequences: Annotated[Positive | None, Placement()] = None
    """Sequences in one forward pass; `null`: 1,024 on a GPU, vLLM's default on a CPU."""
    across_nodes: Annotated[bool, Placement()] = False
    """Allow the GPUs of one copy to be on several nodes, for models that do not fit on one. A replica then requests a
    placement group with one GPU per bundle on as few nodes as possible, and Ray starts vLLM's processes."""

    @property
    def spans_nodes(self) -> bool:
        return self.across_nodes

    @model_validator(mode="after")
    def _check_nodes(self) -> "VLLMEngineConfig":
        if self.across_nodes and self.data_parallel_size > 1:
            raise ValueError(
                "'data_parallel_size' needs all GPUs of a replica on one node; leave 'across_nodes' out, or use "
                "tensor_parallel_size and pipeline_parallel_size"
            )
        return self


class SimulatedEngineConfig(EngineSettings):
    """A teacher without weights, for capacity planning: random signals of the real size, after the time that a real
    teacher would take."""

    kind: Literal["simulated"] = "simulated"
    """The engine's kind."""
    tokens_per_second: Annotated[float, Field(gt=0)] = 10_000.0
    """Tokens per second that one replica scores."""
    generated_tokens_per_second: Annotated[float, Field(gt=0)] = 1_000.0
    """Tokens per second that one replica generates."""
    latency_seconds: Annotated[float, Field(ge=0)] = 0.0
    """Seconds added to each request, while other requests are computed."""
    start_seconds: Annotated[float, Field(ge=0)] = 0.0
    """Seconds until a new replica is ready."""

    @property
    def simulated_rate(self) -> float | None:
        return self.tokens_per_second

    def check_support(self, support: Support) -> None:
        if not isinstance(support, TopK | Logprob):
            raise ValueError(f"the simulated engine has no support '{support.kind}'; use 'topk'")


class OpenAIEngineConfig(EngineSettings):
    """An OpenAI-compatible endpoint as a black box: prompts and completions are text, and there are no signals.

    A single replica sends all requests, so that rate limits and the usage count hold for the whole teacher. The API key
    stays in the environment of the replica's process.
    """

    runs_alone: ClassVar[bool] = True
    applies_chat_template: ClassVar[bool] = True
    counts_tokens: ClassVar[bool] = False

    kind: Literal["openai"] = "openai"
    """The engine's kind."""
    base_url: Annotated[str, Field(pattern=r"^https?://[^@?#\s]+$")] = "https://api.openai.com/v1"
    """The endpoint's URL, without user, password or query, because settings are stored in the run directory."""
    model_name: str | None = None
    """The endpoint's name of the model; `null`: the teacher's `model`."""
    api_key_variable: Annotated[str | None, Placement()] = Field(
        default="OPENAI_API_KEY", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$"
    )
    """The environment variable with the API key, set where the replica runs; `null`: the endpoint needs no key."""
    chat: bool = True
    """Request chat completions, with each prompt as a user's message; `false`: request plain completions."""
    length_parameter: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """The endpoint's name of the length limit in chat; OpenAI's newer models accept only `max_completion_tokens`."""
    logprobs: bool = False
    """Also request the log-probs of the generated tokens, as the endpoint computes them."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Other fields of each request's body, such as `{chat_template_kwargs: {enable_thinking: false}}` for vLLM's server
    or `{reasoning_effort: low}`."""
    concurrency: Annotated[Positive, Placement()] = 16
    """Number of prompts that are requested at the same time."""
    requests_per_minute: Annotated[float | None, Placement()] = Field(default=None, gt=0)
    """Limit on requests per minute, retries included; `null`: no limit. All prompts in flight must be completed within
    `deadline_seconds`."""
    tokens_per_minute: Annotated[float | None, Placement()] = Field(default=None, gt=0)
    """Limit on tokens per minute, prompts and completions together; `null`: no limit."""
    attempts: Annotated[Positive, Placement()] = 5
    """Number of requests for one prompt before the prompt is reported as failed."""
    timeout_seconds: Annotated[float, Placement(), Field(gt=0)] = 60.0
    """Longest time of one request in seconds."""
    price_per_million_prompt_tokens: Annotated[float | None, Placement()] = Field(default=None, ge=0)
    """Price of a million prompt tokens in any currency; if both prices are set, the cost is reported."""
    price_per_million_completion_tokens: Annotated[float | None, Placement()] = Field(default=None, ge=0)
    """Price of a million completion tokens."""

    @field_validator("extra_body")
    @classmethod
    def _check_body(cls, body: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(_BODY_FIELDS & set(body)):
            raise ValueError(
                f"has the field{'s' * (len(taken) > 1)} {', '.join(taken)}, which rayk sets from other settings (the "
                "model's name, the prompts, the sampling); leave out"
            )
        try:
            json.dumps(body, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"cannot be sent as JSON: {error}") from error
        return body

    @property
    def gives_signals(self) -> bool:
        return False

    @property
    def continues_prompts(self) -> bool:
        return not self.chat

    @property
    def generates_logprobs(self) -> bool:
        return self.logprobs

    @property
    def gpus(self) -> float:
        return 0.0

    def check_deadline(self, deadline_seconds: float) -> None:
        if self.timeout_seconds >= deadline_seconds:
            raise ValueError(f"engine.timeout_seconds must be below deadline_seconds ({deadline_seconds:g})")


class CustomEngineConfig(EngineSettings):
    """Your own engine: a class with the methods of `rayk.engines.base.Engine`, created as
    `class(model, settings, trust_remote_code=…)`."""

    verifies_drafts: ClassVar[bool] = True  # the running teacher reports whether it can

    kind: Literal["custom"] = "custom"
    """The engine's kind."""
    path: ClassPath
    """The engine's class as 'module:name', or the name of an entry point in group `rayk.engines`. The module may be a
    file next to the config file."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Your own options; the engine reads them as `settings.options`."""
    signals: bool = True
    """True if the engine returns signals; otherwise it only generates text."""

    @property
    def gives_signals(self) -> bool:
        return self.signals


EngineConfig = Annotated[
    TransformersEngineConfig | VLLMEngineConfig | OpenAIEngineConfig | SimulatedEngineConfig | CustomEngineConfig,
    Field(discriminator="kind"),
]
