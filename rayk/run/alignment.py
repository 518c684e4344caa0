"""Teachers with another tokenizer: their aligners, and checks of the rows in their tokens."""

import logging
from collections.abc import Mapping
from typing import Any

from rayk.config import RunConfig, TeacherConfig
from rayk.config.support import TopK
from rayk.data.alignment import RowAligner, UnalignableRow
from rayk.data.examples import ExampleTable
from rayk.data.views import RowViews
from rayk.errors import InputError
from rayk.models import load_model_config, load_tokenizer, max_positions, real_vocab_size
from rayk.teachers import Teacher

logger = logging.getLogger(__name__)


def make_aligners(config: RunConfig, attached: Mapping[str, Teacher], tokenizer: Any) -> dict[str, RowAligner]:
    """Return the aligner of the method's teacher, by its name; empty unless `method.alignment` is set.

    Args:
        attached: the teachers with `attach: true`, by name.
        tokenizer: the student's.

    Raises:
        InputError: a tokenizer cannot be aligned, or has fewer tokens than the support.
    """
    if not config.aligned_teacher or config.data.train is None:
        return {}
    teacher = next(teacher for teacher in config.teachers if teacher.name == config.aligned_teacher)
    if teacher.attach and attached[teacher.name].info.engine == "openai":
        raise InputError(
            f"Teacher '{teacher.name}' is an endpoint, which generates text and returns no signals; let it generate "
            "the training rows ('synthesis') with method 'supervised'."
        )
    model = teacher.model or attached[teacher.name].info.model
    settings = load_model_config(model, trust_remote_code=teacher.trust_remote_code)
    own_tokenizer = load_tokenizer(model, trust_remote_code=teacher.trust_remote_code)
    _check_support(config, teacher, real_vocab_size(own_tokenizer))
    return {teacher.name: RowAligner(teacher.name, config.data, tokenizer, own_tokenizer, max_positions(settings))}


def _check_support(config: RunConfig, teacher: TeacherConfig, vocab_size: int) -> None:
    support = config.signal_support
    if isinstance(support, TopK) and support.k > vocab_size:
        raise InputError(
            f"method.support.k is {support.k}, but the vocabulary of teacher '{teacher.name}' has {vocab_size} tokens; "
            f"lower it to {vocab_size} at most."
        )


def check_aligned_rows(config: RunConfig, views: RowViews, table: ExampleTable) -> None:
    """Check that training rows can be aligned and are not too long for the teacher, in its own tokens.

    With `training.unusable_rows: skip`, rows that cannot be aligned are reported; training leaves them out.

    Raises:
        InputError: a row cannot be aligned or is too long, or no row can be aligned.
    """
    new_tokens = config.rollouts.max_new_tokens if config.rollouts is not None else 0
    problems: list[UnalignableRow] = []
    for aligner in views.aligners.values():
        for row in table:
            if (length := aligner.prompt_tokens(row) + new_tokens) > aligner.max_tokens:
                raise InputError(
                    f"{row.where} may have {length} tokens with its rollout in the tokenizer of teacher "
                    f"'{aligner.teacher}', which takes {aligner.max_tokens}; lower data.max_prompt_tokens or "
                    "rollouts.max_new_tokens."
                )
            if not row.counted.any():
                continue
            try:
                aligner.align(row)
            except UnalignableRow as error:
                if config.training.unusable_rows == "stop":
                    raise
                problems.append(error)
        if len(problems) == len(table):
            raise problems[0]
    if problems:
        logger.warning("%s Left out, with %d rows in all.", problems[0], len(problems))
