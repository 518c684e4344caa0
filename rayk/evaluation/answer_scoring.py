"""Compare a model's answers with the reference answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rayk.config import EvaluationConfig
from rayk.data.examples import Example
from rayk.errors import InputError
from rayk.evaluation.metrics import AnswerMetrics
from rayk.text.answers import answers_match, find_answer, find_last_match

_REFERENCE_SEPARATOR = "\n— or —\n"


@dataclass(frozen=True)
class Answer:
    """A model's answer to one prompt, with its scores.

    Attributes:
        where: place of the row, for error messages and the report.
        prompt: the prompt with its special tokens, as the model reads it, without a BOS token.
        truth: the row's completion, or its field `evaluation.answer_field`; several references one after the other.
        text: the model's completion.
        tokens: number of generated tokens.
    """

    where: str
    prompt: str
    truth: str
    text: str
    correct: bool
    finish_reason: str
    tokens: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Values of `evaluation.metrics`, by name."""


class AnswerScorer:
    """Score completions: correct ones have the same answer, of type `evaluation.answer_type`, as one of the row's
    references.

    Raises:
        InputError: as `AnswerMetrics`.
    """

    def __init__(self, settings: EvaluationConfig, tokenizer: Any):
        self._settings = settings
        self._tokenizer = tokenizer
        self._metrics = AnswerMetrics(settings.metrics)

    def score(self, example: Example, text: str, finish_reason: str, tokens: int) -> Answer:
        """Return the scores of a completion of the row.

        Raises:
            InputError: the row's references are missing or contain no answer, or a metric fails.
        """
        references, found = self._references(example), self._extract(text)
        expected = self.expected_answers(example)
        correct = found is not None and any(self._match(found, answer) for answer in expected)
        metrics = self._metrics.compute(text, references, example)
        truth = _REFERENCE_SEPARATOR.join(references)
        return Answer(example.where, self._prompt(example), truth, text, correct, finish_reason, tokens, metrics)

    def majority_index(self, texts: Sequence[str]) -> int:
        """Return the index of the first text with the most frequent answer."""
        answers = [self._extract(text) for text in texts]
        return max(range(len(texts)), key=lambda index: answers.count(answers[index]))

    def decode(self, ids: np.ndarray) -> str:
        """Return the text of token ids, without special tokens."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def expected_answers(self, example: Example) -> list[str]:
        """Return the answer in each of the row's references.

        Raises:
            InputError: the row's references are missing or contain no answer.
        """
        return [self._expected(reference, example) for reference in self._references(example)]

    def _expected(self, reference: str, example: Example) -> str:
        answer = self._extract(reference)
        if answer is None:
            settings = self._settings
            finder = "" if settings.answer_pattern is None else f"evaluation.answer_pattern {settings.answer_pattern!r}"
            kind = "" if settings.answer_type == "text" else f"evaluation.answer_type '{settings.answer_type}'"
            raise InputError(
                f"{example.where}: {' with '.join(filter(None, (finder, kind)))} finds nothing in the truth "
                f"{reference[-60:]!r}."
            )
        return answer

    def _references(self, example: Example) -> list[str]:
        name = self._settings.answer_field
        if name is None:
            return [self.decode(example.input_ids[example.prompt_tokens :])]
        if example.fields.get(name) is None:
            raise InputError(f"{example.where} has no field '{name}'; set evaluation.answer_field.")
        value = example.fields[name]
        references = [str(each) for each in value] if isinstance(value, list) else [str(value)]
        if not references:
            raise InputError(f"{example.where}: the list '{name}' of right answers is empty; add one.")
        return references

    def _extract(self, text: str) -> str | None:
        """Return the answer in `text`; None if there is none."""
        settings = self._settings
        if settings.answer_type == "text" or settings.answer_pattern is not None:
            match = find_last_match(text, settings.answer_pattern)
            if match is None or settings.answer_type == "text":
                return match
            text = match
        follows = settings.answer_pattern is not None
        return find_answer(text, settings.answer_type, choices=settings.answer_choices, continues=follows)

    def _match(self, one: str, other: str) -> bool:
        return (
            one == other
            if self._settings.answer_type == "text"
            else answers_match(one, other, self._settings.answer_type)
        )

    def _prompt(self, example: Example) -> str:
        """Return the prompt with its special tokens, which separate the turns of a chat, but without a BOS token that
        only marks its beginning."""
        ids, bos = example.prompt_ids, self._tokenizer.bos_token_id
        is_mark = bos in ids[:1] and bos not in ids[1:]
        return self._tokenizer.decode(ids[1:] if is_mark else ids)
