"""Views: a row as each model of a run reads it (`rayk.data.Example.view`).

A teacher may read another context than the student does: a hint with the right answer (`teachers.prompt_template`,
context distillation, arXiv 2209.15189), or more demonstrations (method `in_context`). Every view ends with the same
counted tokens, so student and teacher align by counted index. A teacher with another tokenizer reads the row in its own
tokens (`rayk.data.alignment`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from rayk.config import DataConfig, DataSource, RunConfig
from rayk.data.alignment import RowAligner
from rayk.data.demonstrations import DemonstrationPool
from rayk.data.examples import Example
from rayk.data.sources import Row
from rayk.data.tokenizing import RowTokenizer
from rayk.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AnyExample = TypeVar("AnyExample", bound=Example)


@dataclass(frozen=True)
class RowViews:
    """Add to rows the contexts that the models of a run read.

    Attributes:
        prompts: tokenizers of the prompts of teachers with a `prompt_template`, by the teacher's name.
        demonstrations: the pool of method `in_context`.
        aligners: by the name of each teacher with another tokenizer (`method.alignment`).
    """

    prompts: Mapping[str, RowTokenizer] = field(default_factory=dict)
    demonstrations: DemonstrationPool | None = None
    aligners: Mapping[str, RowAligner] = field(default_factory=dict)

    @classmethod
    def from_config(
        cls, config: RunConfig, tokenizer: "PreTrainedTokenizerBase", demonstrations: DemonstrationPool | None = None
    ) -> "RowViews":
        """Return the views that the settings define."""
        prompts = {
            teacher.name: _prompt_tokenizer(teacher.prompt_template, config.data, tokenizer)
            for teacher in config.teachers
            if teacher.prompt_template is not None
        }
        return cls(prompts, demonstrations)

    @property
    def is_empty(self) -> bool:
        """Whether all models read rows in the same context and tokens, so that `apply` and `align` change nothing."""
        return not self.prompts and self.demonstrations is None and not self.aligners

    def apply(self, row: Example, seed: int = 0, progress: float = 0.0) -> Example:
        """Return `row` with its contexts; a row that has them already is returned unchanged.

        Args:
            seed: seed of randomly selected demonstrations.
            progress: share of the run's steps before this one, in [0, 1).

        Raises:
            InputError: the row has no prompt to replace, lacks a field of a template, or fails
                `DemonstrationPool.check`.
        """
        if self.demonstrations is not None:
            return self.demonstrations.add_demonstrations(row, seed, progress)
        return self._with_prompts(row)

    def apply_draw(self, row: Example, draw: int = 0) -> Example:
        """Return `row` as it is evaluated: with demonstrations that depend on the row and the draw's number only."""
        if self.demonstrations is not None:
            return self.demonstrations.add_evaluation_demonstrations(row, draw)
        return self._with_prompts(row)

    def align(self, row: AnyExample) -> AnyExample:
        """Return `row`, whose completion is final, with its views in the tokens of other tokenizers.

        Raises:
            UnalignableRow: a teacher's tokenizer cannot represent the row.
        """
        if not self.aligners or row.aligned:
            return row
        return replace(row, aligned={name: aligner.align(row) for name, aligner in self.aligners.items()})

    def has_view(self, teacher: str) -> bool:
        """Return whether a teacher reads rows in another context than the student."""
        return self.demonstrations is not None or teacher in self.prompts or teacher in self.aligners

    def _with_prompts(self, row: Example) -> Example:
        if all(name in row.contexts for name in self.prompts):
            return row
        if not row.prompt_tokens or row.counted[: row.prompt_tokens].any():
            raise InputError(
                f"{row.where or 'A row'} is not a prompt with one completion, so teachers.prompt_template cannot "
                "replace its prompt; leave it out."
            )
        contexts = {name: prompt.prompt_of(Row(row.fields, row.where)) for name, prompt in self.prompts.items()}
        rejected = None if row.rejected is None else replace(row.rejected, contexts=contexts)
        return replace(row, contexts=contexts, rejected=rejected)


def _prompt_tokenizer(template: str, data: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> RowTokenizer:
    """Return the tokenizer of prompts made from `template`, in the chat template if `data.chat_template` is set."""
    source = DataSource(path="", prompt_template=template, format="prompt_completion")
    return RowTokenizer(source, data, tokenizer, prompts_only=True, section="teachers.")
