"""The ways of learning and their settings, told apart by `kind`."""

import difflib
import re
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from rayk.config.base import FUNCTION_PATTERN, ClassPath, Positive, Settings, Share
from rayk.config.data import DataSource
from rayk.config.retriever import RetrieverConfig
from rayk.config.support import Logprob, Requested, Sampled, Support, TopK

DIVERGENCE_OPTIONS: dict[str, tuple[str, ...]] = {
    "forward_kl": (),
    "reverse_kl": (),
    "jensen_shannon": ("beta",),
    "total_variation": (),
    "symmetric_kl": ("weight",),
    "skew_forward_kl": ("alpha",),
    "skew_reverse_kl": ("alpha",),
    "adaptive_kl": ("mu",),
}


class Divergence(Settings):
    """A divergence of `rayk.losses` with its option, or a function of your own ('module:name') with options of its own.
    A name alone is short for one without options."""

    model_config = ConfigDict(extra="allow")

    name: str = "forward_kl"
    beta: Share | None = None
    weight: Share | None = None
    alpha: Share | None = None
    mu: Share | None = None

    @model_validator(mode="after")
    def _known(self) -> "Divergence":
        if self.is_custom:
            return self
        if self.name not in DIVERGENCE_OPTIONS:
            near = difflib.get_close_matches(self.name, DIVERGENCE_OPTIONS, n=1, cutoff=0.4)
            hint = f"did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"unknown divergence '{self.name}'; {hint} Known: {', '.join(DIVERGENCE_OPTIONS)}.")
        for option in self.options:
            if option not in DIVERGENCE_OPTIONS[self.name]:
                raise ValueError(f"'{self.name}' takes no '{option}'")
        return self

    @classmethod
    def allows(cls, values: dict) -> bool:
        return re.match(FUNCTION_PATTERN, str(values.get("name"))) is not None

    @property
    def is_custom(self) -> bool:
        """Whether `name` is a function of the user's."""
        return self.allows({"name": self.name})

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments for the loss function."""
        given = {name: getattr(self, name) for name in ("beta", "weight", "alpha", "mu")} | (self.model_extra or {})
        return {name: value for name, value in given.items() if value is not None}


class SupervisedConfig(Settings):
    """Cross-entropy on the data's own tokens."""

    kind: Literal["supervised"] = "supervised"


class TeacherMethodConfig(Settings):
    """What the methods share that ask a teacher for signals."""

    kind: str
    teacher: str | None = None
    """Which of `teachers`; by default the first."""
    support: Support = TopK()

    @property
    def asks_teacher(self) -> bool:
        """Whether a teacher is asked at all."""
        return True


class DivergenceMethodConfig(TeacherMethodConfig):
    """What the methods share in which the student matches the teacher's distribution."""

    divergence: Annotated[
        Divergence, BeforeValidator(lambda value: {"name": value} if isinstance(value, str) else value)
    ] = Field(default_factory=Divergence)
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Softmax temperature of both sides in the soft term."""
    temperature_squared: bool = False
    """Multiply the soft term by T² (Hinton's scaling); repositories disagree, see ALGORITHMS §25.11."""

    @model_validator(mode="after")
    def _support_carries_temperature(self) -> Self:
        if isinstance(self.support, Logprob) and getattr(self, "form", "") != "policy":
            raise ValueError(f"{self.kind} cannot learn from support 'logprob'; use 'topk' or 'hidden'")
        if isinstance(self.support, Sampled) and (self.divergence.name != "forward_kl" or self.temperature != 1.0):
            raise ValueError("support 'sampled' estimates forward_kl at temperature 1 only; use 'hidden' or 'topk'")
        if isinstance(self.support, TopK | Requested) and self.temperature not in self.support.temperatures:
            temperatures = (*self.support.temperatures, self.temperature)
            object.__setattr__(self, "support", replace(self.support, temperatures=temperatures))
        return self


class LogitKDConfig(DivergenceMethodConfig):
    """The student matches the teacher's distribution at every counted position."""

    kind: Literal["logit_kd"] = "logit_kd"
    hard_label_weight: Share = 0.0
    """α in α·cross-entropy + (1−α)·divergence."""

    @model_validator(mode="after")
    def _names_no_ids(self) -> "LogitKDConfig":
        if isinstance(self.support, Requested):
            raise ValueError("logit_kd cannot learn from support 'requested'; use 'topk' or 'hidden'")
        return self


class AdaptiveConfig(Settings):
    """DistiLLM's adaptive use of what the student writes (arXiv 2402.03898 §3.2): the share of its rows starts at 0 and
    grows each time the evaluation loss rises; more and more of them are then old rollouts again."""

    tolerance: Annotated[float, Field(ge=0)] = 0.1
    """Nats a token by which the evaluation loss must have risen since the share last grew."""
    increment: Share = 0.1
    """What the share then grows by, up to `student_fraction`."""
    replay_capacity: Positive = 1000
    """Rollouts each worker keeps; while there are fewer, none is learned from again."""


class OnPolicyConfig(DivergenceMethodConfig):
    """The student matches the teacher's distribution on completions that the student itself writes (`rollouts`)."""

    kind: Literal["on_policy"] = "on_policy"
    form: Literal["divergence", "policy"] = "divergence"
    """`policy`: instead of a divergence, a policy gradient whose reward is log p − log q of each token the student
    wrote, as Thinking Machines train; with support `logprob`, 4 bytes a token. `divergence` has the same aim with less
    noise."""
    ratio_clip: Annotated[float, Field(gt=0)] | None = None
    """PPO's ε for form `policy`; `null`: none."""
    reward_limit: Annotated[float, Field(gt=0)] = 1000.0
    """As in `minillm`, for form `policy`."""
    ratio_limit: Annotated[float, Field(gt=1)] = 1000.0
    """As in `minillm`, for form `policy`."""
    divergence: Annotated[
        Divergence, BeforeValidator(lambda value: {"name": value} if isinstance(value, str) else value)
    ] = Divergence(name="reverse_kl")
    student_fraction: Share = 1.0
    """λ: the share of rows whose completion the student writes, drawn row by row. 0 is supervised KD, 1 on-policy KD,
    and in between GKD's mixture (arXiv 2306.13649, where it is 0.5)."""
    teacher_written: Share = 0.0
    """Of the other rows, the share whose completion the teacher writes (SeqKD), sampled as `rollouts` says; the rest
    keep the data's."""
    adaptive: AdaptiveConfig | None = None
    """Let the evaluation loss say how much the student writes, up to `student_fraction`; `null`: always that."""
    requested_ids: Positive = 64
    """With support `requested`: how many of the student's own likeliest ids the teacher is asked about at each
    position, beside its own `support.k`."""

    @model_validator(mode="before")
    @classmethod
    def _policy_needs_little(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("form") == "policy":
            return {"support": {"kind": "logprob"}} | given
        return given

    @model_validator(mode="after")
    def _policy_learns_from_its_own(self) -> "OnPolicyConfig":
        if self.form == "policy" and (self.student_fraction < 1 or self.adaptive):
            raise ValueError("form 'policy' learns from what the student has just written alone; leave out "
                             "student_fraction and adaptive, or use form 'divergence'")  # fmt: skip
        return self

    @property
    def reads_completions(self) -> bool:
        """Whether any row keeps the data's completion; else prompts suffice."""
        return (self.student_fraction < 1 or self.adaptive is not None) and self.teacher_written < 1


class PretrainingConfig(Settings):
    """Plain text learned from beside the method's own rows, so that the student forgets less (MiniLLM's L_PT)."""

    data: DataSource
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Of its mean loss a token, beside the method's."""
    batch_size: Positive | None = None
    """Rows a step; by default `training.batch_size`."""
    teacher_share: Share = 0.5
    """r in (1−r)·cross-entropy + r·forward KL to the teacher; 0 asks no teacher about it (the paper's form), 0.5 is
    what LMOps runs."""


class MiniLLMConfig(TeacherMethodConfig):
    """Policy gradients of reverse KL over whole completions, which student and teacher write together (`rollouts`)."""

    kind: Literal["minillm"] = "minillm"
    form: Literal["paper", "lmops"] = "paper"
    """`paper`: the rewards that come after a token, weights on both parts. `lmops`: what the authors' code runs (γ =
    0.95, the token's own reward included, rewards doubled and cut at 100, returns whitened, no weights on the
    single-step part)."""
    teacher_share: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """α: every token is drawn from α·teacher + (1−α)·student. 0: the student writes alone."""
    single_step: bool = True
    """Take the part of the gradient that one token decides exactly, from the teacher's distribution; else each token's
    own reward joins those to come, as in the paper's Eq. 2."""
    length_norm: bool = True
    """Divide the rewards to come by their number."""
    ratio_clip: Annotated[float, Field(gt=0)] | None = 0.2
    """ε of PPO's clipping; `null`: none."""
    reward_limit: Annotated[float, Field(gt=0)] = 1000.0
    """Nats. A completion with a token whose reward is larger either way (the teacher holds it impossible) is treated as
    `training.unusable_rows` says."""
    ratio_limit: Annotated[float, Field(gt=1)] = 1000.0
    """A token that has become so many times likelier since it was written is treated as `training.unusable_rows` says;
    skipped is the token alone."""
    inner_epochs: Positive = 1
    """How often the step learns from its completions, with an optimiser update each."""
    minibatches: Positive = 1
    """Into how many updates each inner epoch is split, by rows."""
    requested_ids: Positive = 64
    """As in `on_policy`."""
    pretraining: PretrainingConfig | None = None
    """L_PT; `null`: none."""

    @property
    def reads_completions(self) -> bool:
        """The data's prompts suffice."""
        return False

    @model_validator(mode="after")
    def _parts_fit(self) -> "MiniLLMConfig":
        if isinstance(self.support, Sampled) or (isinstance(self.support, Logprob) and self.single_step):
            raise ValueError(
                f"minillm cannot take its single-step part, a reverse KL, from support '{self.support.kind}'; use "
                "'topk', 'requested' or 'hidden'"
            )
        if self.form == "lmops" and not self.length_norm:
            raise ValueError("form 'lmops' always divides returns by their length; use form 'paper'")
        return self


class DemonstrationsConfig(Settings):
    """Solved examples that stand before a row: of each its input, `output_separator`, its output, `separator`; then the
    row's own input and `output_separator` (MetaICL, arXiv 2110.15943)."""

    k: Annotated[int, Field(ge=0)] = 16
    """How many the teacher reads; as many as there are of the row's task where they are fewer."""
    choice: Literal["random", "bm25", "embedding", "learned"] = "random"
    """`random`: others in every epoch. `bm25`, `embedding`: those whose inputs are nearest to the row's, the nearest
    last. `learned`: likewise by an encoder that is trained first to find what helps a teacher (`retriever`)."""
    encoder: str | None = None
    """The model whose mean hidden states `embedding` compares, a local folder or hub id; OUTPUT/retriever of a run with
    `learned` too."""
    retriever: RetrieverConfig | None = None
    """How `learned` learns; its own, and no other choice's."""
    pool: DataSource | None = None
    """Rows that demonstrations are taken from; by default the training rows. None has the same input as the row it
    stands before."""
    separator: Annotated[str, Field(min_length=1)] = "\n\n\n"
    output_separator: Annotated[str, Field(min_length=1)] = "\n"
    max_tokens: Positive = 256
    """Of one demonstration without its separators; of a longer one the end of the input is cut off. Where all together
    are more than `data.max_tokens`, they are cut off at their beginning."""
    task_field: str = "task"
    """Only rows of the same task are demonstrations to each other; rows without the field are of one task."""
    options_field: str = "options"
    """The row's field with the list of its possible outputs."""

    @model_validator(mode="after")
    def _encoder_fits(self) -> "DemonstrationsConfig":
        if (self.choice == "embedding") != (self.encoder is not None):
            raise ValueError("'encoder' names the model of choice 'embedding', and of no other; set both or neither")
        if self.choice != "learned":
            if self.retriever is not None:
                raise ValueError(f"'retriever' is choice 'learned's, but choice is '{self.choice}'; leave one out")
            return self
        if not self.k:
            raise ValueError("choice 'learned' has nothing to choose where 'k' is 0; raise it")
        object.__setattr__(self, "retriever", self.retriever or RetrieverConfig())
        return self


class InContextConfig(TeacherMethodConfig):
    """The student learns to learn from demonstrations as the teacher does."""

    kind: Literal["in_context"] = "in_context"
    demonstrations: DemonstrationsConfig = Field(default_factory=DemonstrationsConfig)
    student_demonstrations: Annotated[int, Field(ge=0)] | None = None
    """How many of them the student reads, the last ones; by default all."""
    targets: Literal["label_words", "tokens"] = "label_words"
    """`label_words`: the probabilities of a row's options, renormalised over them; every row needs options. `tokens`:
    the distribution at each token of the output, over the vocabulary."""
    hard_label_weight: Share = 1.0
    """α in α·hard + (1−α)·soft at the first step, from where it moves in a straight line."""
    final_hard_label_weight: Share | None = 0.0
    """α at the end; `null`: the same throughout. The paper's own schedule is not known to us; this is our choice."""
    text_weight: Annotated[float, Field(ge=0)] = 1.0
    """β: of the same hard and soft loss at every token of what the student reads, demonstrations included. It helps
    where the tasks are those of the evaluation (Multitask-ICT) and hurts where they are new (Meta-ICT)."""

    def hard_label_weight_at(self, progress: float) -> float:
        """α after this share of the run."""
        last = self.hard_label_weight if self.final_hard_label_weight is None else self.final_hard_label_weight
        return self.hard_label_weight + (last - self.hard_label_weight) * progress

    @property
    def asks_teacher(self) -> bool:
        return self.hard_label_weight < 1 or self.final_hard_label_weight not in (None, 1)

    @model_validator(mode="after")
    def _parts_fit(self) -> "InContextConfig":
        if self.student_demonstrations is not None and self.student_demonstrations > self.demonstrations.k:
            raise ValueError(
                f"student_demonstrations ({self.student_demonstrations}) are the last of the teacher's, which are "
                f"{self.demonstrations.k}; raise demonstrations.k"
            )
        if self.targets == "label_words" and not self.text_weight:
            object.__setattr__(self, "support", Logprob())  # all that whole words take
        elif self.asks_teacher and isinstance(self.support, Logprob | Requested):
            raise ValueError(f"in_context cannot compare tokens by support '{self.support.kind}'; use 'topk' or "
                             "'hidden'")  # fmt: skip
        return self


class PreferenceConfig(Settings):
    """Of two answers to a prompt the student comes to prefer the chosen one (DPO)."""

    kind: Literal["preference"] = "preference"
    beta: Annotated[float, Field(gt=0)] = 0.1
    """β: how dear it is to leave the reference; small is cheap."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """The share of pairs taken to be the wrong way round (conservative DPO)."""
    chosen_weight: Annotated[float, Field(ge=0)] = 0.0
    """α: how much the chosen answer's own loss, nats a token, counts beside (iterative RPO, Pang et al. 2024, has 1).
    Where the chosen answers are not the student's own it keeps them from becoming unlikely too."""
    reference: str | None = None
    """The frozen model that the student is held against: one of `teachers`; by default the student as the run begins,
    whatever teachers there are."""

    @property
    def teacher(self) -> str | None:
        """Whom the method asks."""
        return self.reference

    @property
    def support(self) -> Logprob | None:
        """What it asks for."""
        return None if self.reference is None else Logprob()

    @property
    def reads_pairs(self) -> bool:
        """Rows are preference pairs."""
        return True


class CustomMethodConfig(Settings):
    """A method of your own: a subclass of `rayk.Method`."""

    kind: Literal["custom"] = "custom"
    path: ClassPath
    """The method's class as 'module:name', or the name of an entry point in group `rayk.methods`. The module may also
    be a file in the folder where rayk was started."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Passed to the method as `self.settings.options`."""
    teacher: str | None = None
    """Which of `teachers` it queries; by default the first."""
    support: Support | None = TopK()
    """What it requests of the teacher at each counted token; `null`: it queries no teacher."""
    rollouts: bool = False
    """Whether it learns from completions that the student generates (a subclass of `rayk.OnPolicyMethod`)."""
    pairs: bool = False
    """Whether each row is a prompt with a better and a worse answer."""

    @property
    def asks_teacher(self) -> bool:
        """Whether it queries a teacher."""
        return self.support is not None

    @property
    def samples_rollouts(self) -> bool:
        """Whether it learns from completions that the student generates."""
        return self.rollouts

    @property
    def reads_pairs(self) -> bool:
        """Whether rows are preference pairs."""
        return self.pairs


MethodConfig = Annotated[
    SupervisedConfig
    | LogitKDConfig
    | OnPolicyConfig
    | MiniLLMConfig
    | InContextConfig
    | PreferenceConfig
    | CustomMethodConfig,
    Field(discriminator="kind"),
]
