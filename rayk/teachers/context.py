"""A teacher that reads each row after a prompt of its own: demonstrations, the right answer, hints that the student is
to learn to do without (context distillation, arXiv 2209.15189).

Teacher and student see different contexts but the same completion, so their distributions align by counted token.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rayk.config import DataConfig, DataSource
from rayk.config.support import Support
from rayk.data.demonstrations import Shown
from rayk.data.examples import Example
from rayk.data.sources import Row
from rayk.data.tokenizing import RowTokenizer
from rayk.errors import InputError
from rayk.signals.batch import SignalBatch
from rayk.signals.sequence import TokenSequence
from rayk.teachers.client import HasSequences, Scorer, Teacher, sequences_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class InContext:
    """`teacher` after prompts made of each row's fields by `template`."""

    def __init__(self, teacher: Teacher, template: str, data: DataConfig, tokenizer: "PreTrainedTokenizerBase"):
        self.teacher = teacher
        self._prompts = prompt_tokenizer(template, data, tokenizer)

    @property
    def vocab_size(self) -> int:
        return self.teacher.vocab_size

    async def ascore(
        self, batch: HasSequences | Sequence[TokenSequence], support: Support | None = None
    ) -> SignalBatch:
        """As `Teacher.ascore`, of sequences that are rows (`rayk.data.Example`)."""
        return await self.teacher.ascore([seen_after(self._prompts, row) for row in sequences_of(batch)], support)


class Demonstrated:
    """`teacher` after the demonstrations that rows carry for it (`rayk.data.demonstrations`)."""

    def __init__(self, teacher: Scorer):
        self.teacher = teacher

    @property
    def vocab_size(self) -> int:
        return self.teacher.vocab_size

    async def ascore(
        self, batch: HasSequences | Sequence[TokenSequence], support: Support | None = None
    ) -> SignalBatch:
        """As `Teacher.ascore`, of rows after demonstrations."""
        rows = (row.teacher_row if isinstance(row, Shown) else row for row in sequences_of(batch))
        return await self.teacher.ascore([row for row in rows if row is not None], support)


def prompt_tokenizer(template: str, data: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> RowTokenizer:
    """What makes a row's prompt of `template`, in the tokenizer's chat template where `data` says so."""
    source = DataSource(path="", prompt_template=template, format="prompt_completion")
    return RowTokenizer(source, data, tokenizer, prompts_only=True, section="teachers.")


def seen_after(prompts: RowTokenizer, row: TokenSequence) -> TokenSequence:
    """`row` as it reads after another prompt: the same tokens count.

    Raises:
        InputError: the row has no prompt of its own to be replaced, or lacks a field of the template.
    """
    if not isinstance(row, Example) or not row.prompt_tokens or row.counted[: row.prompt_tokens].any():
        raise InputError(
            f"{getattr(row, 'where', '') or 'A row'} is no prompt with one completion, so teachers.prompt_template "
            "cannot replace its prompt; leave it out."
        )
    prompt = prompts.prompt_of(Row(row.fields, row.where))
    before = np.zeros(len(prompt), bool)
    return Example(
        np.concatenate([prompt, row.input_ids[row.prompt_tokens :]]),
        np.concatenate([before, row.counted[row.prompt_tokens :]]),
        row.requested, len(prompt), row.where, row.fields,
    )  # fmt: skip
