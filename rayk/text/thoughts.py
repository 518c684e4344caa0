"""Split a reasoning model's thought from its answer.

A completion may begin with a thought between marks, `<think>…</think>`. Some chat templates open the thought
themselves, so that the completion begins inside it; endpoints may then return the end mark only. gpt-oss writes its
thought to the channel 'analysis' and its answer to 'final', of whose marks only the names are left when special tokens
are removed.
"""

import re
from dataclasses import dataclass

_OPEN, _CLOSE = "<think>", "</think>"
_MARKS = ((_OPEN, _CLOSE), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))
_CHANNEL_PROMPT = "<|start|>assistant"
_ANALYSIS = re.compile(
    r"\s*(?:<\|channel\|>)?analysis(?:<\|message\|>)?(?P<thought>.*?)"
    r"(?:(?:<\|end\|>)?(?:<\|start\|>)?assistant(?:<\|channel\|>)?final(?:<\|message\|>)?(?P<answer>.*))?",
    re.DOTALL,
)
_FINAL = re.compile(r"\s*(?:<\|channel\|>)?final(?:<\|message\|>)?(?P<answer>.*)", re.DOTALL)


@dataclass(frozen=True)
class SplitCompletion:
    """A completion's thought and its answer.

    Attributes:
        thought: text between the marks; empty if there is none.
        answer: text after the thought; the whole completion, unchanged, if it has no marks.
        is_cut: whether the completion ends inside its thought, so that it has no answer.
    """

    thought: str
    answer: str
    is_cut: bool = False


def split_thought(completion: str) -> SplitCompletion:
    """Split a completion that `mark_thought` has marked."""
    thoughts, rest = [], completion
    while (marks := _opening_marks(rest)) is not None:
        inside, end, rest = rest.lstrip().removeprefix(marks[0]).partition(marks[1])
        thoughts.append(inside.strip())
        if not end:
            return SplitCompletion("\n\n".join(filter(None, thoughts)), "", is_cut=True)
    if not thoughts:
        return SplitCompletion("", completion)
    return SplitCompletion("\n\n".join(filter(None, thoughts)), rest.lstrip())


def join_thought(thought: str, answer: str) -> str:
    """Return the completion with this thought and this answer, in the form of most chat templates."""
    return f"{_OPEN}\n{thought}\n{_CLOSE}\n\n{answer}" if thought else answer


def mark_thought(completion: str, prompt: str | None) -> str:
    """Return a completion so that its thought, if it has one, begins with its mark.

    Args:
        prompt: all text that the model read before the completion; None if unknown, as for chat completions of an
            endpoint. Then an end mark without a beginning ends a thought too.
    """
    if prompt is None:
        for opening, closing in _MARKS:
            before, end, _ = completion.partition(closing)
            if end and opening not in before:
                return opening + completion
        return completion
    if prompt.endswith(_CHANNEL_PROMPT):
        return _mark_channels(completion)
    opened = next((opening for opening, _ in _MARKS if prompt.rstrip().endswith(opening)), None)
    return completion if opened is None or _opening_marks(completion) else opened + completion


def mark_separate_thought(thought: str, answer: str, *, is_truncated: bool) -> str:
    """Return one completion from a thought and an answer that an endpoint returned apart.

    Args:
        is_truncated: whether the completion reached its token limit: without an answer it then ends in its thought.
    """
    return f"{_OPEN}\n{thought}" if is_truncated and not answer.strip() else join_thought(thought, answer)


def _mark_channels(completion: str) -> str:
    if found := _ANALYSIS.fullmatch(completion):
        thought, answer = found["thought"], found["answer"]
        return f"{_OPEN}\n{thought}" if answer is None else f"{_OPEN}\n{thought}\n{_CLOSE}\n\n{answer}"
    found = _FINAL.fullmatch(completion)
    return completion if found is None else found["answer"]


def _opening_marks(completion: str) -> tuple[str, str] | None:
    start = completion.lstrip()
    return next((marks for marks in _MARKS if start.startswith(marks[0])), None)
