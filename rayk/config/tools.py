"""Settings of a tool that answers the student during rollouts."""

from typing import Annotated, Literal

from pydantic import Field

from rayk.config.base import FunctionPath, Positive, Settings


class ToolConfig(Settings):
    """A function of yours that answers the student's turns, so that a rollout is a conversation: turn, answer, turn.
    The student learns at the tokens of its own turns, and reads the answers."""

    function: FunctionPath
    """`module:name`: your function `answer(messages: list[dict], row: dict) -> str | None`. It gets the turns and
    answers of the rollout, ending with the student's newest turn, and the row's fields; `None` ends the rollout. It is
    called in several threads at a time. A run can only be reproduced if equal arguments give equal answers."""
    max_turns: Annotated[int, Field(ge=2)] = 4
    """Largest number of turns of the student in a rollout; each has up to `rollouts.max_new_tokens` tokens. A truncated
    turn is the last one."""
    max_answer_tokens: Positive = 256
    """Longest answer in tokens, with the text that the chat template prints around it; a longer one loses its end."""
    role: Literal["tool", "user"] = "tool"
    """Role of the answers in the chat template. Templates that require tool calls before role `tool` need `user`."""
