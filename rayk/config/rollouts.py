"""What the student writes while it trains, where, and how old the weights may be that write it."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from rayk.config.base import Positive, Settings
from rayk.config.teachers import LocalEngineConfig, OnVLLM, Replicas, Resources, as_replicas, on_transformers

# What a replica says itself: where the architecture comes from, that the weights come later, and how they get in.
_ITS_OWN_ARGUMENTS = {
    "model", "tokenizer", "dtype", "load_format", "worker_extension_cls", "max_logprobs", "logprobs_mode",
    "trust_remote_code",
}  # fmt: skip


class _Sampling(Settings):
    """How completions are sampled, wherever."""

    max_new_tokens: Positive = 256
    """A completion that is longer is cut; what was written of it counts, an end that was not written does not."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Of sampling alone; 0 is greedy. GKD's reverse KL is taken under the student itself: temperature 1, no
    truncation."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    """0: all tokens."""
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """Step i (from 0) learns from completions sampled under exactly the weights after i − `max_staleness` steps (the
    first ones under the initial weights). 0 samples each step from its own weights, in turn with training; from 1 on
    completions for later steps are written while this one trains. Reproducible either way; by served replicas up to
    rounding, since those share out rows as they come."""
    timeout_seconds: Annotated[float, Field(gt=0)] | None = None
    """How long one step's completions may take until the run stops; `null`: as long as it takes."""


class WorkerRollouts(_Sampling):
    """The training workers generate, each the completions of its own rows."""

    kind: Literal["worker"] = "worker"


class PolicyEngineConfig(LocalEngineConfig):
    """The student in the replica's own process, computing as it does in training: in the student's `dtype`, under
    `training.precision`."""

    kind: Literal["transformers"] = "transformers"


class VLLMPolicyEngineConfig(OnVLLM):
    """vLLM writes, in bfloat16 where the student or `training.precision` is, else in float32. The replica itself keeps
    a copy of the student in the host's memory, from which vLLM takes the weights of each step.

    What it says of a sequence differs from what a training step computes by vLLM's rounding: nothing in float32, too
    much in bfloat16 for methods that weigh tokens by a ratio of the two.
    """

    batch_tokens: Positive = 65_536
    """Tokens, prompts and completions, that one replica is given to write at a time. The teacher reads them while the
    next ones are written."""

    @field_validator("arguments")
    @classmethod
    def _its_own(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := _ITS_OWN_ARGUMENTS & value.keys():
            raise ValueError(f"'{min(taken)}' is what a policy's replica says itself; leave it out")
        return value


_Engines = Annotated[PolicyEngineConfig | VLLMPolicyEngineConfig, Field(discriminator="kind")]


class ServedRollouts(_Sampling):
    """Replicas on Ray Serve generate, and take over the student's weights after each step; so generation scales apart
    from training. Ray's object store holds the weights of two versions."""

    kind: Literal["served"] = "served"
    engine: Annotated[_Engines, BeforeValidator(on_transformers)] = Field(default_factory=PolicyEngineConfig)
    """By default `kind: transformers`."""
    replicas: Annotated[Replicas, BeforeValidator(as_replicas)] = Field(default_factory=Replicas)
    resources: Resources = Field(default_factory=Resources)
    in_flight: Positive = 4
    """Calls one worker may have open at a time for each replica that runs."""
    deadline_seconds: Annotated[float, Field(gt=0)] = 300.0
    """How long one call may take, retries and replica restarts included, before the run stops."""


def _rollouts(value: Any) -> Any:
    return {"kind": "worker"} | value if isinstance(value, dict) else value


_Kinds = Annotated[WorkerRollouts | ServedRollouts, Field(discriminator="kind")]
RolloutConfig = Annotated[_Kinds, BeforeValidator(_rollouts)]
"""By default `kind: worker`."""
