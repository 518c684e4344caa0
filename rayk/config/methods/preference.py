"""Settings of `preference`."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rayk.config.sections import MethodSettings, Run
from rayk.config.support import Logprob, Support


class PreferenceConfig(MethodSettings):
    """The student learns to prefer the chosen of two answers to a prompt (DPO)."""

    teacher_key: ClassVar[str] = "reference"
    default_learning_rate: ClassVar[float] = 1e-6  # of the DPO paper's code and of TRL's DPOTrainer
    default_adapter_learning_rate: ClassVar[float] = 1e-5
    default_warmup_share: ClassVar[float] = 0.1  # of Zephyr's training

    kind: Literal["preference"] = "preference"
    """The method's kind."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Strength β of the regularization towards the reference; the smaller β, the further the student may move away."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share of pairs in which chosen and rejected answer are swapped (conservative DPO)."""
    chosen_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight α of an additional cross-entropy on the chosen answers, in nats per token (iterative RPO, Pang et al.
    2024, uses 1). It keeps chosen answers that are not the student's own from becoming unlikely."""
    reference: str | None = None
    """The frozen reference model, one of `teachers`; `null`: the student at the start of the run, even if there are
    teachers."""

    @property
    def teacher_name(self) -> str | None:
        return self.reference

    @property
    def support(self) -> Logprob | None:
        """The support that is requested from the reference; None if the reference is the initial student."""
        return None if self.reference is None else Logprob()

    @property
    def signal_support(self) -> Support | None:
        return self.support

    @property
    def reads_pairs(self) -> bool:
        return True

    def check(self, run: Run) -> None:
        super().check(run)
        if run.synthesis is not None and not run.synthesis.writes_pairs:
            raise ValueError(
                f"synthesis '{run.synthesis.kind}' generates one answer for each row, but method 'preference' learns "
                "from pairs; use synthesis 'preferences', another method, or rows that have pairs"
            )
        if run.synthesis is None and run.data.train is not None and run.data.train.format not in ("auto", "preference"):
            raise ValueError(
                f"data.train.format is '{run.data.train.format}', but method 'preference' learns from pairs of "
                "answers; leave it out"
            )
