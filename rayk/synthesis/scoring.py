"""Score completions of a prompt: by mean log-prob, by comparison with the right answer, or by a user's function."""

import math
from collections.abc import Callable
from typing import Any

from rayk.config import AnswerConfig
from rayk.errors import InputError
from rayk.synthesis.prompts import Prompt, is_right
from rayk.synthesis.store import StoredCompletion
from rayk.text.answers import find_answer
from rayk.text.functions import describe_error, load_function


class CompletionScorer:
    """Scores completions; higher is better.

    Args:
        scorer: the setting `synthesis.scorer`: 'mean_logprob', 'answer' or 'module:name'.

    Raises:
        InputError: the function cannot be loaded.
    """

    def __init__(self, scorer: str, answer: AnswerConfig):
        self._scorer, self._answer = scorer, answer
        self._function = load_function(scorer, "synthesis.scorer") if ":" in scorer else None

    def __call__(self, prompt: Prompt, response: StoredCompletion, text: str) -> float:
        """Return the score of `text`, the part of the response that would be trained on.

        Raises:
            InputError: there is no score.
        """
        if self._function is not None:
            return call_scorer(self._function, self._scorer, prompt, text)
        if self._scorer == "answer":
            assert prompt.truth is not None
            answer = find_answer(text, self._answer.type, choices=self._answer.choices)
            return float(is_right(answer, prompt.truth, self._answer))
        if response.mean_logprob is None:
            raise InputError(
                "synthesis.scorer 'mean_logprob': the teacher returns no log-probs of its completions; choose another "
                "scorer."
            )
        return round(response.mean_logprob, 4)


def call_scorer(function: Callable[..., Any], name: str, prompt: Prompt, text: str) -> float:
    """Call a user's scorer with (prompt, completion, row).

    Raises:
        InputError: it fails, or does not return a number.
    """
    try:
        value = function(prompt.text, text, dict(prompt.fields))
    except Exception as error:  # a user's function can raise anything
        raise InputError(
            f"synthesis.scorer '{name}' failed with {describe_error(error)} for {prompt.where}."
        ) from error
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if math.isnan(score):
        raise InputError(f"synthesis.scorer '{name}' returned {value!r} for {prompt.where}; let it return a number.")
    return score
