"""Compare a model's answers with the reference answers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rayk.config import EvaluationConfig
from rayk.data.examples import Example
from rayk.errors import InputError
from rayk.evaluation.metrics import AnswerMetrics
from rayk.text.answers import answers_match, find_answer, find_last_match
from rayk.text.words import words

_LONGEST_TEXT_WORDS = 20
"""Average length up to which whole texts can be expected to be equal."""
_REFERENCE_SEPARATOR = "\n— or —\n"


@dataclass(frozen=True)
class Answer:
    """A model's answer to one prompt, with its scores.

    Attributes:
        where: place of the row, for error messages and the report.
        prompt: the prompt with its special tokens, as the model reads it, without a BOS token.
        truth: the row's completion, or its field `evaluation.answer_field`; several references one after the other.
        text: the model's completion.
        correct: whether the answer is right; None if it is of type `open`.
        tokens: number of generated tokens.
    """

    where: str
    prompt: str
    truth: str
    text: str
    correct: bool | None
    finish_reason: str
    tokens: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Values of `evaluation.metrics`, by name."""


class AnswerScorer:
    """Score completions: correct ones have the same answer, of type `evaluation.answer_type`, as one of the row's
    references. Answers of type `open` have metrics only.

    Raises:
        InputError: as `AnswerMetrics`.
    """

    def __init__(self, settings: EvaluationConfig, tokenizer: Any):
        self._settings = settings
        self._tokenizer = tokenizer
        self._metrics = AnswerMetrics(settings.scored_metrics)
        self._type = settings.answer_type or "text"

    def score(self, example: Example, text: str, finish_reason: str, tokens: int) -> Answer:
        """Return the scores of a completion of the row.

        Raises:
            InputError: the row's references are missing or contain no answer, or a metric fails.
        """
        references = self.references(example)
        correct = None if self._type == "open" else self._is_correct(text, example)
        metrics = self._metrics.compute(text, references, example)
        truth = _REFERENCE_SEPARATOR.join(references)
        return Answer(example.where, self._prompt(example), truth, text, correct, finish_reason, tokens, metrics)

    def _is_correct(self, text: str, example: Example) -> bool:
        found, expected = self._extract(text), self.expected_answers(example)
        return found is not None and any(self._match(found, answer) for answer in expected)

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
        return [self._expected(reference, example) for reference in self.references(example)]

    def _expected(self, reference: str, example: Example) -> str:
        answer = self._extract(reference)
        if answer is None:
            pattern = self._settings.answer_pattern
            finder = "" if pattern is None else f"evaluation.answer_pattern {pattern!r}"
            kind = "" if self._type == "text" else f"evaluation.answer_type '{self._type}'"
            raise InputError(
                f"{example.where}: {' with '.join(filter(None, (finder, kind)))} finds nothing in the truth "
                f"{reference[-60:]!r}."
            )
        return answer

    def references(self, example: Example) -> list[str]:
        """Return the row's right answers, as they stand in the row.

        Raises:
            InputError: they are missing.
        """
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
        is_whole = self._type in ("text", "open")
        if is_whole or settings.answer_pattern is not None:
            match = find_last_match(text, settings.answer_pattern)
            if match is None or is_whole:
                return match
            text = match
        follows = settings.answer_pattern is not None
        return find_answer(text, self._type, choices=settings.answer_choices, continues=follows)

    def _match(self, one: str, other: str) -> bool:
        return one == other if self._type == "text" else answers_match(one, other, self._type)

    def _prompt(self, example: Example) -> str:
        """Return the prompt with its special tokens, which separate the turns of a chat, but without a BOS token that
        only marks its beginning."""
        ids, bos = example.prompt_ids, self._tokenizer.bos_token_id
        is_mark = bos in ids[:1] and bos not in ids[1:]
        return self._tokenizer.decode(ids[1:] if is_mark else ids)


def settle_answer_type(settings: EvaluationConfig, rows: Iterable[Example], tokenizer: Any) -> EvaluationConfig:
    """Return `settings` with the `answer_type` that `null` means for the rows that are answered by generation.

    Raises:
        InputError: a row's references are missing.
    """
    if settings.answer_type is not None:
        return settings
    needs_accuracy = settings.keep_best is not None and settings.keep_best.metric == "accuracy"
    kind = "text"
    if settings.answer_pattern is None and not needs_accuracy:
        scorer = AnswerScorer(settings, tokenizer)
        lengths = [len(words(reference)) for row in rows for reference in scorer.references(row)]
        kind = "open" if lengths and np.mean(lengths) > _LONGEST_TEXT_WORDS else "text"
    return settings.model_copy(update={"answer_type": kind})
