"""Methods in which the student matches the teacher's distribution."""

import re
from dataclasses import replace
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from rayk.config.base import FUNCTION_PATTERN, Positive, Settings, Share, closest, unknown_key
from rayk.config.methods.teacher import TeacherMethodConfig
from rayk.config.sections import MethodSettings
from rayk.config.support import Layers, Logprob, Requested, Sampled, TopK

DIVERGENCE_OPTIONS: dict[str, tuple[str, ...]] = {
    "forward_kl": (),
    "reverse_kl": (),
    "jensen_shannon": ("beta",),
    "total_variation": (),
    "symmetric_kl": ("weight",),
    "skew_forward_kl": ("alpha",),
    "skew_reverse_kl": ("alpha",),
    "adaptive_kl": ("mu",),
    "decoupled_kl": ("alpha", "beta", "warmup_steps"),
    "adaptive_teaching": ("alpha",),
}
_READ_TARGETS = ("decoupled_kl", "adaptive_teaching")
_UNBOUNDED = {("decoupled_kl", "alpha"), ("decoupled_kl", "beta")}
"""Options that may exceed 1."""


class Divergence(Settings):
    """A divergence of `rayk.losses`, or your own function, with its options. A text is short for `{name: <text>}`."""

    model_config = ConfigDict(extra="allow")

    name: str = "forward_kl"
    """A divergence of `rayk.losses`, or your own function 'module:name' (`rayk/methods/README.md`), to which other keys
    of this section are passed as keyword arguments."""
    beta: Annotated[float, Field(ge=0)] | None = None
    """Weight β of `jensen_shannon` (at most 1), or of the other tokens (NCKD) in `decoupled_kl`; `null`: its default,
    0.5 or 8."""
    weight: Share | None = None
    """Weight of the reverse KL in `symmetric_kl`; `null`: its default."""
    alpha: Annotated[float, Field(ge=0)] | None = None
    """Share α of the teacher's p in the mixture of `skew_forward_kl`, or of the student's q in that of
    `skew_reverse_kl`; the weight of the gold token (TCKD) in `decoupled_kl`, which may exceed 1; the weight of easy
    tokens in `adaptive_teaching`. `null`: the default, 0.1, 0.1, 1 and 0.2."""
    mu: Share | None = None
    """Share μ of the probability mass that `adaptive_kl` counts as the head of the distribution; `null`: its
    default."""
    warmup_steps: Positive | None = None
    """Number of steps over which the weight of `decoupled_kl` grows linearly to 1, so that the hard label
    (`method.hard_label_weight`) counts more at first; `null`: none."""

    @model_validator(mode="after")
    def _check_options(self) -> "Divergence":
        if self.is_custom:
            return self
        if self.name not in DIVERGENCE_OPTIONS:
            near = closest(self.name, DIVERGENCE_OPTIONS, cutoff=0.4)
            hint = f"did you mean '{near}'? " if near else ""
            raise ValueError(
                f"unknown divergence '{self.name}'; {hint}Known: {', '.join(DIVERGENCE_OPTIONS)}, or your own function "
                "as 'module:name'"
            )
        if self.model_extra:
            raise unknown_key(next(iter(self.model_extra)), type(self).model_fields)
        for option in self.options:
            if option not in DIVERGENCE_OPTIONS[self.name]:
                raise ValueError(f"'{self.name}' takes no '{option}'")
            if option in ("alpha", "beta") and (self.name, option) not in _UNBOUNDED and self.options[option] > 1:
                raise ValueError(f"'{option}' of '{self.name}' is {self.options[option]:g}; give a number from 0 to 1")
        return self

    @property
    def is_custom(self) -> bool:
        """Return whether `name` is a user's function."""
        return re.match(FUNCTION_PATTERN, self.name) is not None

    @property
    def reads_targets(self) -> bool:
        """Return whether the loss treats the gold token apart: `decoupled_kl` and `adaptive_teaching`."""
        return self.name in _READ_TARGETS

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the divergence."""
        names = ("beta", "weight", "alpha", "mu", "warmup_steps")
        given = {name: getattr(self, name) for name in names} | (self.model_extra or {})
        return {name: value for name, value in given.items() if value is not None}


def _expand_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


DivergenceConfig = Annotated[Divergence, BeforeValidator(_expand_name)]


class DivergenceLossConfig(MethodSettings):
    """Base of methods whose loss contains a divergence from the teacher's distribution."""

    divergence: DivergenceConfig = Field(default_factory=Divergence)
    """The divergence of the student's distribution from the teacher's: its name, or `{name, <options>}`."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Softmax temperature of both distributions in the divergence."""
    temperature_squared: bool = False
    """Multiply the divergence by T² (Hinton et al. 2015, §2, so that its gradients keep their size at any T)."""

    @property
    def uses_divergence(self) -> bool:
        """Return whether the loss is the divergence."""
        return True


class DivergenceMethodConfig(DivergenceLossConfig, TeacherMethodConfig):
    """Base of methods in which the student matches the teacher's distribution."""

    @model_validator(mode="after")
    def _check_support(self) -> Self:
        if isinstance(self.support, Logprob | Layers) and self.uses_divergence:
            raise ValueError(f"{self.kind} cannot learn from support '{self.support.kind}'; use 'topk' or 'hidden'")
        if isinstance(self.support, Sampled) and (self.divergence.name != "forward_kl" or self.temperature != 1.0):
            raise ValueError("support 'sampled' estimates forward_kl at temperature 1 only; use 'hidden' or 'topk'")
        if self.uses_divergence and self.divergence.reads_targets:
            self._check_decoupled()
        if isinstance(self.support, TopK | Requested) and self.temperature not in self.support.temperatures:
            temperatures = (*self.support.temperatures, self.temperature)
            object.__setattr__(self, "support", replace(self.support, temperatures=temperatures))
        return self

    def _check_decoupled(self) -> None:
        name = self.divergence.name
        if self.temperature != 1.0 and name == "adaptive_teaching":
            raise ValueError("divergence 'adaptive_teaching' is defined at temperature 1; leave temperature out")
        if self.temperature != 1.0 and isinstance(self.support, TopK | Requested):
            raise ValueError(
                f"divergence '{name}' needs the gold token's probability at temperature {self.temperature:g}, which a "
                f"signal '{self.support.kind}' does not always contain; use support 'hidden', or temperature 1"
            )
        if name == "adaptive_teaching" and self.normalization != "tokens":
            raise ValueError(
                "divergence 'adaptive_teaching' is a mean over the easy and the hard tokens of the step; leave "
                "normalize out"
            )
        if self.aligns_tokens:
            raise ValueError(
                f"divergence '{name}' needs a teacher with the student's tokenizer; leave alignment out, or choose "
                "another divergence"
            )
