"""Compare two chat templates by what they print for the same conversations."""

from itertools import takewhile

from rayk.data.chat_template import ChatTemplate, Message
from rayk.errors import InputError

_SHOWN = 40
_USER: Message = {"role": "user", "content": "What is 2 + 2?"}
_ANSWER: Message = {"role": "assistant", "content": "It is 4."}
_PROBES: dict[str, tuple[list[Message], bool]] = {
    "a question with its generation prompt": ([_USER], True),
    "a question and its answer": ([_USER, _ANSWER], False),
    "two turns": ([_USER, _ANSWER, _USER], True),
    "a system prompt": ([{"role": "system", "content": "Be brief."}, _USER], True),
}


def templates_differ(first: ChatTemplate, second: ChatTemplate) -> str | None:
    """Return where two templates first print different texts ("in two turns, 'a' instead of 'b'"); None if they agree.

    Probes are a question, its answer, two turns and a system prompt, which both templates may refuse.
    """
    for name, (messages, generation) in _PROBES.items():
        one, other = (_render(template, messages, generation) for template in (first, second))
        if one == other:
            continue
        if one is None or other is None:
            return f"only one of them accepts {name}"
        start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
        return f"in {name}, {_excerpt(one, start)} instead of {_excerpt(other, start)}"
    return None


def _render(template: ChatTemplate, messages: list[Message], generation: bool) -> str | None:
    try:
        return template.render(messages, "", add_generation_prompt=generation)
    except InputError:
        return None


def _excerpt(text: str, start: int) -> str:
    return repr(text[start : start + _SHOWN]) if start < len(text) else "nothing"
