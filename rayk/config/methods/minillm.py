"""Settings of `minillm`."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from rayk.config.base import Positive
from rayk.config.methods.normalization import TokenLossConfig
from rayk.config.methods.teacher import TeacherMethodConfig
from rayk.config.pretraining import PretrainingConfig
from rayk.config.roles import find_continuing_teachers
from rayk.config.sections import Run
from rayk.config.support import Layers, Logprob, Sampled
from rayk.config.teachers import TeacherConfig


class MiniLLMConfig(TeacherMethodConfig, TokenLossConfig):
    """Policy gradients of the reverse KL over whole completions, which student and teacher sample together
    (`rollouts`)."""

    default_learning_rate: ClassVar[float] = 5e-6  # of LMOps' scripts
    default_adapter_learning_rate: ClassVar[float] = 5e-5

    kind: Literal["minillm"] = "minillm"
    """The method's kind."""
    form: Literal["paper", "lmops"] = "paper"
    """`paper`: a return is the sum of the rewards after a token, and both parts of the gradient have importance
    weights. `lmops`: what the authors' code computes (γ = 0.95, returns include the token's own reward, rewards are
    doubled and clipped at 100, returns are whitened, the single-step part has no importance weights)."""
    teacher_share: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """α: every token is sampled from α·teacher + (1−α)·student. 0: from the student alone."""
    single_step: bool = True
    """Compute the part of the gradient that depends on a single token exactly, from the teacher's distribution.
    `false`: a token's return also includes its own reward, as in the paper's Eq. 2."""
    length_norm: bool = True
    """Divide each return by its number of rewards."""
    ratio_clip: Annotated[float, Field(gt=0)] | None = 0.2
    """ε of PPO's clipping; `null`: no clipping."""
    reward_limit: Annotated[float, Field(gt=0)] = 1000.0
    """Largest absolute reward of a token, in nats. A completion with a larger one (the teacher finds the token
    impossible) is handled as `training.unusable_rows` says."""
    ratio_limit: Annotated[float, Field(gt=1)] = 1000.0
    """Largest factor by which a token may have become more likely since it was sampled. A token above it is handled as
    `training.unusable_rows` says; only the token is skipped."""
    inner_epochs: Positive = 1
    """Number of passes over a step's completions, with one optimizer update each."""
    minibatches: Positive = 1
    """Number of updates in each pass, each on a part of the rows."""
    requested_ids: Positive = 64
    """As in method `on_policy`."""
    pretraining: PretrainingConfig | None = None
    """Plain text that is trained on in the same updates (L_PT in the paper); `null`: none."""

    @property
    def reads_completions(self) -> bool:
        return False

    @property
    def samples_rollouts(self) -> bool:
        return True

    @property
    def samples_with_teacher(self) -> bool:
        return self.teacher_share > 0

    @property
    def weighs_rollout_logprobs(self) -> bool:
        return True

    @property
    def auxiliary_data(self) -> PretrainingConfig | None:
        return self.pretraining

    @model_validator(mode="after")
    def _check_form(self) -> "MiniLLMConfig":
        is_logprob = isinstance(self.support, Logprob) and self.single_step
        if isinstance(self.support, Sampled | Layers) or is_logprob:
            raise ValueError(
                f"minillm cannot compute its single-step part, a reverse KL, from support '{self.support.kind}'; use "
                "'topk', 'requested' or 'hidden'"
            )
        if self.form == "lmops" and not self.length_norm:
            raise ValueError("form 'lmops' always divides returns by their length; use form 'paper'")
        return self

    def check(self, run: Run) -> None:
        super().check(run)
        workers = run.training.most_workers
        smallest = self.minibatches * max(1, workers)
        if smallest > run.training.batch_size:
            raise ValueError(
                f"method.minibatches ({self.minibatches}) for each of training.workers ({workers}) need at least one "
                f"row each, but training.batch_size is {run.training.batch_size}; raise it"
            )
        text_rows = self.pretraining and self.pretraining.batch_size
        if text_rows and smallest > text_rows:
            raise ValueError(
                f"method.minibatches ({self.minibatches}) for each of training.workers ({workers}) need at least one "
                f"row of text each, but method.pretraining.batch_size is {text_rows}; raise it"
            )
        if not self.teacher_share:
            return
        if run.rollouts is not None and run.rollouts.is_served:
            raise ValueError(
                "method.teacher_share samples from student and teacher together, which only the training workers can "
                "do; use rollouts.kind 'worker', or set method.teacher_share to 0"
            )
        for teacher in find_continuing_teachers(run, "method.teacher_share"):
            self._check_sampling_teacher(teacher)

    def _check_sampling_teacher(self, teacher: TeacherConfig) -> None:
        if teacher.prompt_template is not None or not (teacher.engine.verifies_drafts or teacher.attach):
            raise ValueError(
                f"method.teacher_share: teacher '{teacher.name}' cannot sample together with the student; it needs "
                "engine kind 'transformers' and no prompt_template, or set method.teacher_share to 0"
            )
