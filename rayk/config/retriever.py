"""The learned retriever of demonstrations (LLM-R, arXiv 2307.07164); defaults are those of the paper and its code."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from rayk.config.base import Positive, Settings


class EncoderTraining(Settings):
    """How an encoder is trained: AdamW, warmed up in a straight line and down to 0 in another."""

    steps: Positive
    batch_size: Positive
    """Queries of a step."""
    learning_rate: Annotated[float, Field(gt=0)]
    warmup_steps: Annotated[int, Field(ge=0)] = 400
    max_tokens: Positive
    """Of a longer text the first so many are read."""

    @model_validator(mode="after")
    def _warms_up(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be below steps ({self.steps}); lower it")
        return self


class RewardModelConfig(EncoderTraining):
    """A cross-encoder that reads query, right answer and candidate, and learns to put first what the teacher does."""

    model: str = "google/electra-base-discriminator"
    """A local folder or hub id."""
    steps: Positive = 3000
    batch_size: Positive = 16
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    max_tokens: Positive = 384
    negatives: Positive = 7
    """Candidates that a better one is held against."""


class RetrieverConfig(EncoderTraining):
    """A bi-encoder that finds the demonstrations which help a teacher most. Its candidates are what is nearest by
    BM25, in later rounds by the retriever of the round before; the teacher says how likely each makes the right answer,
    the reward model learns that from it, and the encoder from the reward model."""

    encoder: str = "intfloat/e5-base-v2"
    """The model it begins as, a local folder or hub id."""
    teacher: str | None = None
    """Who scores candidates, one of `teachers`; by default the method's, or the first that gives signals."""
    reward_model: RewardModelConfig | None = Field(default_factory=RewardModelConfig)
    """`null`: the encoder learns from the teacher's scores themselves."""
    rounds: Positive = 2
    steps: Positive = 6000
    """In each round, which begins anew from `encoder`."""
    batch_size: Positive = 32
    learning_rate: Annotated[float, Field(gt=0)] = 3e-5
    max_tokens: Positive = 256
    prompt: str = ""
    """Stands before every text, as some encoders want it ('query: ')."""
    queries: Positive = 200_000
    """At most so many different training inputs are scored."""
    nearest: Positive = 100
    """Candidates of a query are the nearest so many,"""
    candidates: Positive = 32
    """and so many drawn of them are scored."""
    positives: Positive = 3
    """The best so many of them may be a step's positive,"""
    worst: Positive = 16
    """and the worst so many its negatives."""
    passages: Annotated[int, Field(ge=2)] = 4
    """Candidates that the encoder compares in a step, of each query one positive and else negatives."""
    temperature: Annotated[float, Field(gt=0)] = 0.01
    """Of the cosines."""
    contrastive_weight: Annotated[float, Field(ge=0)] = 0.2
    """Of telling a query's positive from what else is in the batch."""
    same_label: bool = True
    """Where query and candidate have the same `options`, a candidate with another output is no use, whatever the
    teacher would say; it is not asked."""
    held_out: Positive = 200
    """Queries that the retriever is measured on and does not learn from; at most a tenth of all."""

    @model_validator(mode="after")
    def _numbers_fit(self) -> "RetrieverConfig":
        if self.candidates > self.nearest:
            raise ValueError(f"candidates ({self.candidates}) are drawn of nearest ({self.nearest}); raise nearest")
        if self.positives >= self.candidates:
            raise ValueError(
                f"positives ({self.positives}) leave no negative among candidates ({self.candidates}); raise candidates"
            )
        return self
