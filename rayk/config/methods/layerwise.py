"""Settings of `layerwise`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rayk.config.base import Positive, Settings, Share
from rayk.config.methods.divergence import DivergenceLossConfig
from rayk.config.methods.normalization import TokenLossConfig
from rayk.config.sections import Run
from rayk.config.stages import Stage
from rayk.config.support import LayerPart, Layers, Support
from rayk.errors import InputError

_Number = Annotated[int, Field(ge=0)]


class LayerFiltersConfig(Settings):
    """Task-aware filters (TED): maps of each matched layer's states that are trained, before the student, to keep what
    predicts the next token."""

    steps: Positive
    """Number of the run's first steps, which train the filters of both models and leave the student as it is. The other
    steps train the student with its filters. Each stage has its own warmup and schedule."""
    kind: Literal["linear", "mlp"] = "linear"
    """A filter: a linear map, or two of them with a GELU between. It returns states of the teacher's width."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate of the first stage."""


class LayerwiseConfig(DivergenceLossConfig, TokenLossConfig):
    """The student's layers learn the hidden states of the teacher's layers, beside the teacher's distribution."""

    kind: Literal["layerwise"] = "layerwise"
    """The method's kind."""
    teacher: str | None = None
    """Which of `teachers` is queried; `null`: the first."""
    layers: Positive | Annotated[list[tuple[_Number, _Number]], Field(min_length=1)] = 4
    """Pairs of layers that are matched. A number N: N layers of each model, spread evenly, of which the last layer is
    one, in order. A list of pairs [student's layer, teacher's layer], numbered from 0. A layer's state is its output,
    before the final norm."""
    distance: Literal["mse", "cosine", "attention"] = "mse"
    """The distance of two states: the mean squared difference of their numbers, or 1 − their cosine. `attention`: the
    divergences of the relations among queries, keys and values of a layer, instead of its outputs (MiniLMv2)."""
    relation_heads: Positive | None = None
    """With `attention`: number of parts into which queries, keys and values are split, each with relations of its own;
    it divides the sizes of all three in both models. `null`: the largest that leaves at least 32 numbers to each
    part."""
    layer_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight w of the mean distance over the pairs."""
    hard_label_weight: Share = 0.5
    """Weight α in α·cross-entropy + (1−α)·divergence + w·distance. With 1 and without filters, the teacher sends the
    states of layers only."""
    filters: LayerFiltersConfig | None = None
    """Match filtered states (TED); `null`: the states themselves, the student's projected where the widths differ."""
    states: Literal["int8", "float16", "bfloat16", "float32"] = "int8"
    """The type in which the teacher's states are sent (`dtype` of support `layers`)."""

    @property
    def teacher_name(self) -> str | None:
        return self.teacher

    @property
    def support(self) -> Layers:
        """The support that is requested from the teacher."""
        layers = self.layers if isinstance(self.layers, int) else tuple(teacher for _, teacher in self.layers)
        final = "float16" if self.states == "int8" else self.states
        part: LayerPart = "attention" if self.distance == "attention" else "output"
        return Layers(layers, self.states, final if self.uses_divergence or self.filters else None, part)

    @property
    def signal_support(self) -> Support | None:
        return self.support

    @property
    def student_layers(self) -> int | list[int]:
        """The student's layers of the pairs, in their order, or their number."""
        return self.layers if isinstance(self.layers, int) else [student for student, _ in self.layers]

    @property
    def uses_divergence(self) -> bool:
        return self.hard_label_weight < 1

    def check_steps(self, steps: int) -> None:
        if self.filters is not None and self.filters.steps >= steps:
            raise InputError(
                f"method.filters.steps is {self.filters.steps}, but the run has only {steps} steps, so that none would "
                "train the student; lower it, or raise training.steps or training.epochs."
            )

    def stage(self, step: int, steps: int) -> Stage:
        if self.filters is None:
            return super().stage(step, steps)
        if step < self.filters.steps:
            return Stage(step, self.filters.steps, self.filters.learning_rate)
        return Stage(step - self.filters.steps, steps - self.filters.steps)

    @model_validator(mode="after")
    def _check_divergence(self) -> "LayerwiseConfig":
        if self.divergence.reads_targets:
            raise ValueError(
                f"layerwise has no divergence '{self.divergence.name}'; choose another one, or method 'logit_kd'"
            )
        if self.distance == "attention" and self.filters is not None:
            raise ValueError("'filters' are of the outputs of layers; leave them out, or choose another 'distance'")
        if self.distance != "attention" and self.relation_heads is not None:
            raise ValueError("'relation_heads' has an effect with 'distance: attention' only; leave it out")
        return self

    def check(self, run: Run) -> None:
        super().check(run)
        if run.ensemble or run.route:
            raise ValueError("layerwise matches the layers of one teacher; leave out 'ensemble' and 'route'")
        if run.training.compile:
            raise ValueError(
                "layerwise takes the states of the student's layers, which has not been tested with compiled layers; "
                "set training.compile to false"
            )
        if self.filters is not None and run.evaluation.patience is not None:
            raise ValueError(
                "evaluation.patience would end the run while method.filters.steps leave the student as it is; leave it "
                "out"
            )
