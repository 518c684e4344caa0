"""Views: a row as each model of a run reads it (`rayk.data.Example.view`).

A teacher may read another context than the student does: privileged information such as the right answer
(`teachers.prompt_template`; context distillation, arXiv 2209.15189), or more demonstrations (method `in_context`).
Every view ends with the same counted tokens, so student and teacher align by counted index. A teacher with another
tokenizer reads the row in its own tokens (`rayk.data.alignment`).
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from rayk.config import DataConfig, DataSource, RunConfig
from rayk.data.alignment import RowAligner
from rayk.data.chat_template import ChatTemplate, Message
from rayk.data.demonstrations import DemonstrationPool
from rayk.data.examples import Example
from rayk.data.row_texts import RowTexts
from rayk.data.sources import Row
from rayk.data.text_encoder import TextEncoder
from rayk.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AnyExample = TypeVar("AnyExample", bound=Example)


class TeacherPrompt:
    """Encodes the prompt of a teacher with a `prompt_template`.

    If the student reads a row in a chat template, so does the teacher: the template's text replaces the last user's
    message, {prompt} is that message, and the system prompt, earlier turns and tools stay. Otherwise the template's
    text is the prompt, and {prompt} is the prompt that the student reads.
    """

    def __init__(self, template: str, data: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._template = RowTexts(
            DataSource(path="", prompt_template=template, format="prompt_completion"), "teachers."
        )  # fmt: skip
        sources = [source for source in (data.train, data.evaluation) if source is not None]
        self._texts = [RowTexts(source) for source in sources or [DataSource(path="")]]
        self._in_chat = bool(data.chat_template)
        self._encoder = TextEncoder(tokenizer, ChatTemplate.from_settings(data, tokenizer))

    def encode(self, row: Row, *, is_pair: bool = False) -> np.ndarray:
        """Return the token ids of a row's prompt as the teacher reads it, int32 [length].

        Raises:
            InputError: the row lacks a field of the template, or has no user's message to replace.
        """
        texts, messages = self._messages(row, is_pair)
        if isinstance(messages, str):
            return np.asarray(self._encoder.prompts([self._fill(row, messages)])[0], np.int32)
        last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
        if last is None:
            raise InputError(f"{row.where} has no user's message, which teachers.prompt_template could replace.")
        content = self._fill(row, messages[last]["content"])
        messages = [*messages[:last], {**messages[last], "content": content}, *messages[last + 1 :]]
        return np.asarray(self._encoder.chat_prompt(messages, row.where, texts.tools(row)), np.int32)

    def _fill(self, row: Row, prompt: str) -> str:
        """Return the template's text, in which {prompt} is the student's `prompt`."""
        return self._template.prompt(replace(row, fields={**row.fields, "prompt": prompt}))

    def _messages(self, row: Row, is_pair: bool) -> tuple[RowTexts, list[Message] | str]:
        """Return the messages after which the student reads the completion, or its prompt's text if it reads no chat,
        with the settings of the source that the row fits: training rows, or else evaluation rows."""
        problem = None
        for texts in self._texts:
            try:
                form = texts.format_of(row, prompts_only=True, pairs=is_pair)
                is_chat = form == "messages" or (form == "preference" and texts.has_conversations(row))
                if is_chat or self._in_chat:
                    _check_one_turn(texts, row, is_pair)
                    return texts, texts.prompt_messages(row, pairs=form == "preference")
                return texts, texts.prompt(row)
            except InputError as error:
                problem = problem or error
        assert problem is not None
        raise problem


def _check_one_turn(texts: RowTexts, row: Row, is_pair: bool) -> None:
    turns = []
    if not is_pair:
        with suppress(InputError):  # a prompt without a completion
            turns = texts.conversation(row).turns
    if len(turns) > 1:
        raise InputError(
            f"{row.where} has {len(turns)} trained turns, but teachers.prompt_template replaces the prompt of one; set "
            "data.train.train_on: last, or leave prompt_template out."
        )


@dataclass(frozen=True)
class RowViews:
    """Add to rows the contexts that the models of a run read.

    Attributes:
        prompts: the prompts of teachers with a `prompt_template`, by the teacher's name.
        demonstrations: the pool of method `in_context`.
        aligners: by the name of each teacher with another tokenizer (`method.alignment`).
    """

    prompts: Mapping[str, TeacherPrompt] = field(default_factory=dict)
    demonstrations: DemonstrationPool | None = None
    aligners: Mapping[str, RowAligner] = field(default_factory=dict)

    @classmethod
    def from_config(
        cls, config: RunConfig, tokenizer: "PreTrainedTokenizerBase", demonstrations: DemonstrationPool | None = None
    ) -> "RowViews":
        """Return the views that the settings define."""
        prompts = {
            teacher.name: TeacherPrompt(teacher.prompt_template, config.data, tokenizer)
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

    def reads_prompts(self, teacher: str) -> bool:
        """Return whether a teacher reads a prompt before each completion, the student's or its own, without
        demonstrations and in the student's tokens."""
        return self.demonstrations is None and teacher not in self.aligners

    def _with_prompts(self, row: Example) -> Example:
        if all(name in row.contexts for name in self.prompts):
            return row
        if not row.prompt_tokens or row.counted[: row.prompt_tokens].any():
            raise InputError(
                f"{row.where or 'A row'} is not a prompt with one completion, so teachers.prompt_template cannot "
                "replace its prompt; leave it out."
            )
        source = Row(row.fields, row.where)
        contexts = {
            name: prompt.encode(source, is_pair=row.rejected is not None) for name, prompt in self.prompts.items()
        }
        rejected = None if row.rejected is None else replace(row.rejected, contexts=contexts)
        return replace(row, contexts=contexts, rejected=rejected)
