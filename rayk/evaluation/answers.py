"""Scoring answers: the task's own truth against what a model wrote."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rayk.config import EvaluationConfig
from rayk.data.examples import Example
from rayk.errors import InputError
from rayk.text.answers import find_last_match


@dataclass(frozen=True)
class Answer:
    """One answered prompt, as the report shows it."""

    where: str
    prompt: str
    truth: str
    text: str
    correct: bool
    finish_reason: str
    tokens: int


class AnswerScorer:
    """Compares what `evaluation.answer_pattern` finds in a completion with what it finds in the truth."""

    def __init__(self, settings: EvaluationConfig, tokenizer):
        self._settings = settings
        self._tokenizer = tokenizer

    def score(self, example: Example, text: str, finish_reason: str, tokens: int) -> Answer:
        """
        Raises:
            InputError: the row's truth is missing or has no answer in it.
        """
        prompt = self._tokenizer.decode(example.prompt_ids, skip_special_tokens=True)
        correct = self._extract(text) == self.expected(example)
        return Answer(example.where, prompt, self._truth(example), text, correct, finish_reason, tokens)

    def majority(self, texts: Sequence[str]) -> int:
        """The place of a text that gives the answer most of them give; of several such the first."""
        answers = [self._extract(text) for text in texts]
        return max(range(len(texts)), key=lambda place: answers.count(answers[place]))

    def text_of(self, ids: np.ndarray) -> str:
        """The text of token ids, special tokens left out."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def expected(self, example: Example) -> str:
        """The right answer of the row.

        Raises:
            InputError: its truth is missing or has no answer in it.
        """
        truth = self._truth(example)
        answer = self._extract(truth)
        if answer is None:
            raise InputError(
                f"{example.where}: evaluation.answer_pattern {self._settings.answer_pattern!r} finds nothing in the "
                f"truth {truth[-60:]!r}."
            )
        return answer

    def _truth(self, example: Example) -> str:
        field = self._settings.answer_field
        if field is None:
            return self._tokenizer.decode(example.input_ids[example.prompt_tokens :], skip_special_tokens=True)
        fields: Mapping = example.fields
        if field not in fields:
            raise InputError(f"{example.where} has no field '{field}'; set evaluation.answer_field.")
        return str(fields[field])

    def _extract(self, text: str) -> str | None:
        """The answer in `text`; None where the pattern finds none."""
        return find_last_match(text, self._settings.answer_pattern)
