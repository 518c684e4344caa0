"""The learned retriever of demonstrations (LLM-R, arXiv 2307.07164); defaults are those of the paper and its code."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from rayk.config.base import InputPath, Positive, Settings


class EncoderTraining(Settings):
    """Training of an encoder: AdamW, with a learning rate that rises linearly in the warmup and then falls to 0."""

    steps: Positive
    """Number of optimizer steps."""
    batch_size: Positive
    """Queries per step."""
    learning_rate: Annotated[float, Field(gt=0)]
    """Peak learning rate."""
    warmup_steps: Annotated[int, Field(ge=0)] = 400
    """Number of steps over which the learning rate rises linearly from 0."""
    max_tokens: Positive
    """Longest text in tokens; a longer one is cut at its end."""

    @model_validator(mode="after")
    def _check_warmup(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be below steps ({self.steps}); lower it")
        return self


class RewardModelConfig(EncoderTraining):
    """A cross-encoder that reads query, right answer and candidate, and learns to rank candidates as the teacher
    does."""

    model: InputPath = "google/electra-base-discriminator"
    """The model that training starts from: a local folder or hub id."""
    steps: Positive = 3000
    """Number of optimizer steps."""
    batch_size: Positive = 16
    """Queries per step."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Peak learning rate."""
    max_tokens: Positive = 384
    """Longest text in tokens; a longer one is cut at its end."""
    negatives: Positive = 7
    """Number of worse candidates that a better one is compared with."""


class RetrieverConfig(EncoderTraining):
    """A bi-encoder that finds the demonstrations which help a teacher most.

    The candidates of a query are the nearest inputs by BM25 in the first round, and by the previous round's retriever
    in later rounds. The teacher scores each candidate by the log-prob of the right answer after it. The reward model
    learns these scores, and the encoder learns from the reward model.
    """

    encoder: InputPath = "intfloat/e5-base-v2"
    """The model that each round starts from: a local folder or hub id."""
    teacher: str | None = None
    """Which of `teachers` scores candidates; `null`: the method's teacher, or the first that returns signals."""
    reward_model: RewardModelConfig | None = Field(default_factory=RewardModelConfig)
    """The reward model; `null`: the encoder learns from the teacher's scores directly."""
    rounds: Positive = 2
    """Number of rounds."""
    steps: Positive = 6000
    """Number of optimizer steps in each round."""
    batch_size: Positive = 32
    """Queries per step."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-5
    """Peak learning rate."""
    max_tokens: Positive = 256
    """Longest text in tokens; a longer one is cut at its end."""
    prompt: str = ""
    """Text before each input of the encoder, which some encoders need ('query: ')."""
    queries: Positive = 200_000
    """Largest number of different training inputs that are scored."""
    nearest: Positive = 100
    """Number of nearest candidates per query."""
    candidates: Positive = 32
    """Number of candidates that are drawn from the nearest ones and scored."""
    positives: Positive = 3
    """Number of best candidates from which a step's positive is drawn."""
    worst: Positive = 16
    """Number of worst candidates from which a step's negatives are drawn."""
    passages: Annotated[int, Field(ge=2)] = 4
    """Candidates per query in a step: one positive, the others negatives."""
    temperature: Annotated[float, Field(gt=0)] = 0.01
    """Temperature of the cosine similarities."""
    contrastive_weight: Annotated[float, Field(ge=0)] = 0.2
    """Weight of the contrastive loss, which separates a query's positive from all other candidates in the batch."""
    same_label: bool = True
    """If query and candidate have the same `options`, treat a candidate with another output as the worst, and do not
    query the teacher."""
    held_out: Positive = 200
    """Number of queries that the retriever is evaluated on and not trained on; at most a tenth of all."""

    @model_validator(mode="after")
    def _check_numbers(self) -> "RetrieverConfig":
        if self.candidates > self.nearest:
            raise ValueError(f"candidates ({self.candidates}) are drawn from nearest ({self.nearest}); raise nearest")
        if self.positives >= self.candidates:
            raise ValueError(
                f"positives ({self.positives}) leave no negative among candidates ({self.candidates}); raise candidates"
            )
        return self
