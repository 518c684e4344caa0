"""Which of several answers to a prompt is the better one: by its mean log-prob, by the truth, or by a function of the
user's."""

import math

from rayk.config import AnswerConfig
from rayk.errors import InputError
from rayk.synthesis.prompts import Prompt, is_right
from rayk.synthesis.store import StoredCompletion
from rayk.text.answers import find_answer
from rayk.text.functions import load_function


class CompletionScorer:
    """Scores answers; higher is better.

    Args:
        scorer: 'mean_logprob', 'answer' or 'module:name', as `synthesis.scorer` says it.

    Raises:
        InputError: the function cannot be loaded.
    """

    def __init__(self, scorer: str, answer: AnswerConfig):
        self._scorer, self._answer = scorer, answer
        self._own = load_function(scorer, "synthesis.scorer") if ":" in scorer else None

    def __call__(self, prompt: Prompt, written: StoredCompletion, text: str) -> float:
        """The score of `text`, the part of `written` that would be learned.

        Raises:
            InputError: it cannot be told.
        """
        if self._own is not None:
            return self._by_function(prompt, text)
        if self._scorer == "answer":
            assert prompt.truth is not None
            found = find_answer(text, self._answer.type, choices=self._answer.choices)
            return float(is_right(found, prompt.truth, self._answer))
        if written.mean_logprob is None:
            raise InputError(
                "synthesis.scorer 'mean_logprob': the teacher tells no log-probs of what it writes; choose another "
                "scorer."
            )
        return round(written.mean_logprob, 4)

    def _by_function(self, prompt: Prompt, text: str) -> float:
        assert self._own is not None
        try:
            score = float(self._own(prompt.text, text, dict(prompt.fields)))
        except Exception as error:
            raise InputError(
                f"synthesis.scorer '{self._scorer}' failed with {type(error).__name__} ({error}) for {prompt.where}."
            ) from error
        if math.isnan(score):
            raise InputError(f"synthesis.scorer '{self._scorer}' returned NaN for {prompt.where}.")
        return score
