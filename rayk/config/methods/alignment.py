"""Settings of teachers with another tokenizer."""

from typing import Annotated, Literal

from pydantic import Field

from rayk.config.base import Settings
from rayk.config.sections import MethodSettings, Run
from rayk.config.support import Hidden, TopK


class AlignmentConfig(Settings):
    """Alignment of the tokens of student and teacher, which have different tokenizers."""

    kind: Literal["bytes"] = "bytes"
    """`bytes`: tokens are aligned by the bytes of the text that they cover."""
    unmatched: Literal["sorted", "ignore"] = "sorted"
    """Probability on tokens that only one of the vocabularies contains. `sorted`: the distance of the sorted
    probabilities of both sides is added to the loss (universal logit distillation, arXiv 2402.12030). `ignore`: it is
    not part of the loss."""
    unmatched_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the sorted distance."""


def check_alignment(method: MethodSettings, run: Run) -> None:
    """Check a method that aligns tokenizers against the run's other sections.

    Raises:
        ValueError: the sections do not fit together; the message says what to change.
    """
    if run.ensemble or run.route:
        raise ValueError("method.alignment aligns one teacher's tokens; leave out 'ensemble' and 'route'")
    if not isinstance(method.signal_support, TopK | Hidden):
        kind = method.signal_support.kind if method.signal_support else "none"
        raise ValueError(f"method.alignment cannot use support '{kind}'; use 'topk', or 'hidden' (exact)")
    if run.data.train is not None and run.data.train.train_on == "all":
        raise ValueError(
            "method.alignment aligns one completion per row, but data.train.train_on is 'all'; set it to 'last'"
        )
    for teacher in run.signal_teachers:
        if teacher.prompt_template is not None and teacher.name == run.evaluation_teacher:
            raise ValueError(
                f"teacher '{teacher.name}' has a prompt_template, but with method.alignment it reads the student's "
                "prompt in its own tokens; leave one of the two out"
            )
