"""Compare a model's answers with the reference answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rayk.config import EvaluationConfig
from rayk.data.examples import Example
from rayk.errors import InputError
from rayk.evaluation.metrics import AnswerMetrics
from rayk.text.answers import find_last_match


@dataclass(frozen=True)
class Answer:
    """A model's answer to one prompt, with its scores.

    Attributes:
        where: place of the row, for error messages and the report.
        truth: the row's completion, or its field `evaluation.answer_field`.
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
    """Score completions: correct ones have the same match of `evaluation.answer_pattern` as the row's truth.

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
            InputError: the row's truth is missing or contains no answer, or a metric fails.
        """
        prompt, truth = self._tokenizer.decode(example.prompt_ids, skip_special_tokens=True), self._truth(example)
        correct = self._extract(text) == self.expected_answer(example)
        metrics = self._metrics.compute(text, truth, example)
        return Answer(example.where, prompt, truth, text, correct, finish_reason, tokens, metrics)

    def majority_index(self, texts: Sequence[str]) -> int:
        """Return the index of the first text with the most frequent answer."""
        answers = [self._extract(text) for text in texts]
        return max(range(len(texts)), key=lambda index: answers.count(answers[index]))

    def decode(self, ids: np.ndarray) -> str:
        """Return the text of token ids, without special tokens."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def expected_answer(self, example: Example) -> str:
        """Return the answer that the pattern finds in the row's truth.

        Raises:
            InputError: the row's truth is missing or contains no answer.
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
        if field not in example.fields:
            raise InputError(f"{example.where} has no field '{field}'; set evaluation.answer_field.")
        return str(example.fields[field])

    def _extract(self, text: str) -> str | None:
        """Return the answer in `text`; None if the pattern does not match."""
        return find_last_match(text, self._settings.answer_pattern)
