"""Settings of `on_policy`."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rayk.config.base import Positive, Settings, Share
from rayk.config.methods.alignment import AlignmentConfig, check_alignment
from rayk.config.methods.divergence import Divergence, DivergenceConfig, DivergenceMethodConfig
from rayk.config.methods.normalization import TokenLossConfig
from rayk.config.methods.reward import RewardConfig
from rayk.config.roles import find_continuing_teachers
from rayk.config.sections import Run


class AdaptiveConfig(Settings):
    """DistiLLM's adaptive share of rollouts (arXiv 2402.03898, §3.2): the share starts at 0 and grows whenever the
    evaluation loss has risen. During training, a growing part of the rollouts comes from a replay buffer of earlier
    ones."""

    tolerance: Annotated[float, Field(ge=0)] = 0.1
    """Nats per token by which the evaluation loss must have risen since the share last grew."""
    increment: Share = 0.1
    """Growth of the share, up to `student_fraction`."""
    replay_capacity: Positive = 1000
    """Number of rollouts in each worker's replay buffer; until it is full, no rollout is trained on again."""


class OnPolicyConfig(DivergenceMethodConfig, TokenLossConfig):
    """The student matches the teacher's distribution on completions that the student generates (`rollouts`)."""

    kind: Literal["on_policy"] = "on_policy"
    """The method's kind."""
    form: Literal["divergence", "policy"] = "divergence"
    """`divergence`: the loss is the divergence. `policy`: a policy gradient whose reward is log p − log q of each
    generated token (Thinking Machines, 2025), with support `logprob` at 4 bytes per token; it minimizes the reverse KL
    too, with noisier gradients."""
    ratio_clip: Annotated[float, Field(gt=0)] | None = None
    """ε of PPO's clipping, for form `policy`; `null`: no clipping."""
    reward: RewardConfig | None = None
    """A task reward beside distillation, for form `policy` with `rollouts.samples` of 2 or more; `null`: none."""
    reward_limit: Annotated[float, Field(gt=0)] = 1000.0
    """As in method `minillm`; for form `policy`."""
    ratio_limit: Annotated[float, Field(gt=1)] = 1000.0
    """As in method `minillm`; for form `policy`."""
    divergence: DivergenceConfig = Divergence(name="reverse_kl")
    """The divergence of the student's distribution from the teacher's: its name, or `{name, <options>}`."""
    hard_label_weight: Share = 0.0
    """Weight α in α·cross-entropy + (1−α)·divergence, in rows whose completion the student did not generate: with
    `student_fraction` below 1, or with `adaptive`."""
    student_fraction: Share = 1.0
    """λ: the probability that the student generates a row's completion, drawn for each row. 0 is supervised KD, 1 is
    on-policy KD; GKD's mixture (arXiv 2306.13649) is 0.5."""
    teacher_written: Share = 0.0
    """Share of the other rows whose completion the teacher generates (sequence-level KD), with the sampling settings of
    `rollouts`, after its own prompt if it has a `prompt_template`; the remaining rows keep their own completion."""
    first_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the tokens of each rollout, from its first one, that enter the loss. Late tokens follow text that the
    teacher would not write; with 0.3, on-policy distillation was about as good as with all (arXiv 2606.22600)."""
    adaptive: AdaptiveConfig | None = None
    """Adapt the share of rollouts to the evaluation loss, up to `student_fraction`; `null`: the share is constant."""
    requested_ids: Positive = 64
    """With support `requested`: number of the student's own most likely ids per position at which the teacher returns
    log-probs, besides the teacher's own `support.k`."""
    alignment: AlignmentConfig | None = None
    """As in method `logit_kd`; for form `divergence`."""

    @model_validator(mode="before")
    @classmethod
    def _default_policy_support(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("form") == "policy":
            return {"support": {"kind": "logprob"}} | given
        return given

    @model_validator(mode="after")
    def _check_policy_rows(self) -> "OnPolicyConfig":
        if self.form == "policy" and (self.student_fraction < 1 or self.adaptive):
            raise ValueError("form 'policy' learns only from new completions of the student; leave out "
                             "student_fraction and adaptive, or use form 'divergence'")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _check_hard_labels(self) -> "OnPolicyConfig":
        if self.hard_label_weight and self.student_fraction == 1 and self.adaptive is None:
            raise ValueError(
                "hard_label_weight is set, but the student generates the completion of every row, so there are no hard "
                "labels; set student_fraction below 1, or leave hard_label_weight out"
            )
        return self

    @model_validator(mode="after")
    def _check_first_share(self) -> "OnPolicyConfig":
        if self.first_share < 1 and self.student_fraction == 0 and self.adaptive is None:
            raise ValueError("first_share is set, but the student generates no completions; set student_fraction above "
                             "0, or leave first_share out")  # fmt: skip
        return self

    @property
    def aligns_tokens(self) -> bool:
        return self.alignment is not None

    @property
    def uses_divergence(self) -> bool:
        return self.form == "divergence"

    @property
    def reads_completions(self) -> bool:
        return (self.student_fraction < 1 or self.adaptive is not None) and self.teacher_written < 1

    @property
    def samples_rollouts(self) -> bool:
        return True

    @property
    def weighs_rollout_logprobs(self) -> bool:
        return self.form == "policy"

    def check(self, run: Run) -> None:
        super().check(run)
        if self.alignment is not None:
            self._check_tokens(run)
        if self.adaptive and not (run.data.evaluation and run.evaluation.every_steps):
            raise ValueError(
                "method.adaptive needs the evaluation loss; set data.evaluation and evaluation.every_steps"
            )
        if self.reward is not None and (run.rollouts is None or run.rollouts.samples == 1 or self.form != "policy"):
            raise ValueError(
                "method.reward compares the completions of one prompt, by policy gradient; set method.form to 'policy' "
                "and rollouts.samples to 2 or more"
            )
        if self.teacher_written:
            find_continuing_teachers(run, "method.teacher_written")

    def _check_tokens(self, run: Run) -> None:
        if self.form == "policy":
            raise ValueError(
                "method.alignment compares distributions, which form 'policy' does not; use form 'divergence'"
            )
        if self.teacher_written:
            raise ValueError(
                "method.teacher_written trains on the teacher's tokens, but with method.alignment it has another "
                "tokenizer; set it to 0, and let the teacher generate rows with synthesis 'responses' instead"
            )
        check_alignment(self, run)
