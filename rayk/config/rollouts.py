"""Completions that the student generates during training: where they are generated, and with which weights."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from rayk.config.base import Placement, Positive, default_kind
from rayk.config.engines import LocalEngineConfig, VLLMSettings
from rayk.config.sections import RolloutSettings, Run
from rayk.config.teachers import Replicas, ReplicasConfig, Resources

# Arguments that the policy's replica sets itself.
_RESERVED_ARGUMENTS = {
    "model", "tokenizer", "dtype", "load_format", "worker_extension_cls", "max_logprobs", "logprobs_mode",
    "trust_remote_code",
}  # fmt: skip


class WorkerRollouts(RolloutSettings):
    """The training workers generate the completions, each for its own rows."""

    kind: Annotated[Literal["worker"], Placement()] = "worker"
    """The place where completions are generated."""
    batch_tokens: Annotated[Positive, Placement()] = 32_768
    """Tokens of prompts and longest completions that a worker generates as one group, padding included. A group's
    memory is that of its keys and values. The teacher scores a group while the next one is generated."""

    @property
    def served(self) -> None:
        """None, because there are no replicas."""
        return None


class PolicyEngineConfig(LocalEngineConfig):
    """The student runs in the replica's own process and is computed as in training: with `student.dtype` and
    `training.precision`."""

    kind: Literal["transformers"] = "transformers"
    """The engine's kind."""

    def max_tokens(self, model_limit: float) -> float:
        """Return the longest row in tokens that the engine accepts, for a model that accepts `model_limit`."""
        return model_limit

    def check_rollouts(self, rollouts: RolloutSettings, run: Run) -> None:
        """Accept all rollouts, because this engine can generate any."""


class VLLMPolicyEngineConfig(VLLMSettings):
    """vLLM generates: in bfloat16 if `student.dtype` or `training.precision` is bfloat16, else in float32. The replica
    has a copy of the student in the host's memory, from which vLLM loads the weights of each step.

    vLLM's log-probs differ from those of a training step by rounding. The difference is negligible in float32. In
    bfloat16 it is too large for policy gradients, which use the ratio of the two probabilities.
    """

    batch_tokens: Positive = 65_536
    """Tokens of prompts and completions that one replica generates as one group. The teacher scores a group while the
    next one is generated."""

    @field_validator("arguments")
    @classmethod
    def _check_arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := _RESERVED_ARGUMENTS & value.keys():
            raise ValueError(f"'{min(taken)}' is set by the policy's replica; leave it out")
        return value

    def max_tokens(self, model_limit: float) -> float:
        """As in `PolicyEngineConfig`, less one token, because vLLM generates at least one token after its input."""
        return min(model_limit, self.max_model_len or math.inf) - 1

    def check_rollouts(self, rollouts: RolloutSettings, run: Run) -> None:
        """Check that vLLM can generate these rollouts; errors as `RolloutSettings.check`."""
        if not (rollouts.temperature == 0 or 0.01 <= rollouts.temperature <= 2):
            raise ValueError(
                f"rollouts.temperature is {rollouts.temperature:g}, but vLLM samples at temperatures from 0.01 to 2, "
                "or 0 for greedy"
            )
        if run.method.weighs_rollout_logprobs and "bfloat16" in (run.training.precision, run.student.dtype):
            raise ValueError(
                f"{run.method.kind}'s policy gradient needs log-probs of the rollouts that equal those of the training "
                "step, but vLLM's log-probs in bfloat16 do not; use rollouts.engine.kind 'transformers', or "
                "training.precision and student.dtype 'float32'"
            )


PolicyEngine = Annotated[PolicyEngineConfig | VLLMPolicyEngineConfig, Field(discriminator="kind")]


class ServedRollouts(RolloutSettings):
    """Replicas on Ray Serve generate the completions and load the student's weights after each step, so that generation
    scales independently of training. Ray's object store contains two versions of the weights."""

    kind: Annotated[Literal["served"], Placement()] = "served"
    """The place where completions are generated."""
    engine: Annotated[PolicyEngine, default_kind("transformers"), Placement()] = Field(
        default_factory=PolicyEngineConfig
    )
    """The engine that generates; by default `kind: transformers`."""
    replicas: Annotated[ReplicasConfig, Placement()] = Field(default_factory=Replicas)
    """Number of copies of the student; a single number is the fixed number of copies."""
    resources: Annotated[Resources, Placement()] = Field(default_factory=Resources)
    """Resources of one replica."""
    in_flight: Annotated[Positive, Placement()] = 4
    """Number of calls that one worker may have open per running replica."""
    deadline_seconds: Annotated[float, Placement(), Field(gt=0)] = 300.0
    """Longest time in seconds in which the policy answers none of a worker's calls; then the run stops."""

    @property
    def served(self) -> "ServedRollouts":
        """The settings of the replicas."""
        return self

    @property
    def is_served(self) -> bool:
        return True

    def check(self, run: Run) -> None:
        super().check(run)
        self.engine.check_rollouts(self, run)


_Kinds = Annotated[WorkerRollouts | ServedRollouts, Field(discriminator="kind")]
RolloutConfig = Annotated[_Kinds, default_kind("worker")]
"""By default `kind: worker`."""
