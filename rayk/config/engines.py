"""Settings of the engines that run a model, with the capabilities of each engine."""

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from rayk.config.base import ClassPath, Dtype, Placement, Positive, Settings
from rayk.config.support import Hidden, Logprob, Requested, Sampled, Support, TopK

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


class VLLMSettings(EngineSettings):
    """Base of the vLLM engines: vLLM's asynchronous engine in one or more processes of its own.

    A replica requests `tensor_parallel_size` GPUs of one node from Ray, unless `resources.num_gpus` is set; vLLM runs
    one process on each GPU.
    """

    kind: Literal["vllm"] = "vllm"
    """The engine's kind."""
    tensor_parallel_size: Annotated[Positive, Placement()] = 1
    """Number of GPUs that share one copy of the model."""
    max_model_len: Annotated[int, Field(ge=2)] | None = None
    """Longest sequence in tokens, prompt and completion together; `null`: the model's own limit. The KV cache must have
    room for one such sequence."""
    gpu_memory_utilization: Annotated[float | None, Placement()] = Field(default=None, gt=0, le=1)
    """Share of each GPU's memory that one engine takes; `null`: vLLM's default. On a CPU it is a share of the machine's
    memory, and `null` gives the KV cache 1 GiB."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Other arguments of vLLM's `AsyncEngineArgs`, by name."""

    @property
    def gpus(self) -> float:
        return float(self.tensor_parallel_size)


class VLLMEngineConfig(VLLMSettings):
    """vLLM: fast, on one or more GPUs of a node; top-k signals at temperature 1."""

    dtype: Dtype = "auto"
    """The type of weights and computation; `auto`: the type of the checkpoint, or a 16-bit type if that is float32."""
    across_nodes: Annotated[bool, Placement()] = False
    """Allow the GPUs of one copy to be on several nodes, for models that do not fit on one. A replica then requests a
    placement group with one GPU per bundle on as few nodes as possible, and Ray starts vLLM's processes."""
    hidden: bool = False
    """Also return support `hidden`. vLLM needs a second engine for it, which loads the model once more: keep
    `gpu_memory_utilization` below 0.5, with room for the head."""

    @property
    def spans_nodes(self) -> bool:
        return self.across_nodes

    @model_validator(mode="after")
    def _check_second_engine(self) -> "VLLMEngineConfig":
        if self.across_nodes and self.hidden:
            raise ValueError("'across_nodes' has GPUs for one engine only, but 'hidden' needs two; leave one out")
        return self

    def check_support(self, support: Support) -> None:
        if isinstance(support, Hidden) and not self.hidden:
            raise ValueError("support 'hidden' on vLLM needs a second engine; set 'engine.hidden: true'")
        if isinstance(support, Sampled):
            raise ValueError("vLLM cannot sample at the positions of a prompt; use 'topk', or engine kind "
                             "'transformers'")  # fmt: skip
        if isinstance(support, TopK | Requested) and set(support.temperatures) != {1.0}:
            raise ValueError(
                "vLLM returns log-probs at temperature 1 only; use support 'hidden', or engine kind 'transformers'"
            )


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
