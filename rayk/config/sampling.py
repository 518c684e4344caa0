"""Settings of the completions that a synthesis requests: sampling, and serving of a student that generates."""

from typing import Annotated

from pydantic import Field

from rayk.config.base import Placement, Positive, Settings, default_kind
from rayk.config.engines import TransformersEngineConfig, VLLMEngineConfig
from rayk.config.teachers import Replicas, ReplicasConfig, Resources


class SamplingConfig(Settings):
    """Sampling of completions."""

    max_new_tokens: Positive = 256
    """Longest completion in tokens; longer ones are cut."""
    temperature: Annotated[float, Field(ge=0)] = 0.7
    """Sampling temperature; 0 is greedy decoding."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the most likely tokens with this total probability; 1: from all."""
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Texts that end a completion and are not part of it, such as "\\nQ:", so that a base model does not continue with
    another question."""


class ServedStudentConfig(Settings):
    """Serving of the student while it generates answers for a synthesis. The replicas are stopped before training."""

    engine: Annotated[
        Annotated[TransformersEngineConfig | VLLMEngineConfig, Field(discriminator="kind")],
        default_kind("transformers"),
    ] = Field(default_factory=TransformersEngineConfig)
    """The engine that runs the student; by default `kind: transformers`."""
    replicas: Annotated[ReplicasConfig, Placement()] = Field(default_factory=Replicas)
    """Number of copies; a single number is the fixed number of copies."""
    resources: Annotated[Resources, Placement()] = Field(default_factory=Resources)
    """Resources of one replica."""
    deadline_seconds: Annotated[float, Placement(), Field(gt=0)] = 300.0
    """Longest time of one request in seconds, retries and replica restarts included; then the run stops."""
