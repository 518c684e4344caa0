"""Where the turns of a chat template begin and end: told by rendering a message that can be found again.

A model that was trained on a template and is fed what precedes the user's text goes on as a user would (Magpie). What
that is, and what ends the turn, differs from template to template:

    Llama-3   <|begin_of_text|><|start_header_id|>user<|end_header_id|>⏎⏎ … <|eot_id|>
    Qwen2.5   <|im_start|>system⏎You are Qwen, … <|im_end|>⏎<|im_start|>user⏎ … <|im_end|>⏎
    Gemma-2   <bos><start_of_turn>user⏎ … <end_of_turn>⏎
    Mistral   <s>[INST] … [/INST]
"""

from dataclasses import dataclass

from rayk.data.tokens import Encoder
from rayk.errors import InputError

# Letters alone: what templates strip, escape or look for in a message is not among them.
_MARKS = ("Xqzwoven", "Vjkhollow")
_BEGINNINGS = ("The", "What", "I", "1", "Über", "请")


@dataclass(frozen=True)
class ChatTurns:
    """How the turns of a template begin and end, as text.

    Attributes:
        user_begins: all that precedes the user's text, the system's turn included.
        user_ends, assistant_ends: what ends their turns: a special token, or where there is none the first words that
            the template puts behind. For the assistant it may be empty: only the model's own end-of-text token does.
    """

    user_begins: str
    user_ends: str
    assistant_ends: str


def find_chat_turns(encoder: Encoder, system: str | None, where: str) -> ChatTurns:
    """The turns of the tokenizer's chat template, after a system prompt if there is one.

    Args:
        where: how errors begin ("teacher 'big'").

    Raises:
        InputError: there is no template, it takes no system prompt, or it does not say where a user's turn begins and
            ends.
    """
    if not encoder.tokenizer.chat_template:
        raise InputError(
            f"{where} has no chat template in its tokenizer, and magpie draws instructions from one; name the "
            "tokenizer of a chat model as synthesis.tokenizer, or use a teacher that was trained to chat."
        )
    opening = [] if system is None else [{"role": "system", "content": system}]
    told = f"{where}{'' if system is None else ', with synthesis.system'}"
    before, behind = _around(encoder, [*opening, {"role": "user"}], told)
    user_ends = _ending(encoder, behind)
    if not user_ends:
        raise InputError(
            f"{told}: the chat template puts nothing behind a user's message, so nothing says where an instruction "
            "ends; name the tokenizer of another one as synthesis.tokenizer."
        )
    question = {"role": "user", "content": "?"}
    if system is not None and system.strip() not in before:
        raise InputError(f"{told}: the chat template leaves a system prompt out; leave synthesis.system out.")
    if not before.strip():
        raise InputError(
            f"{told}: the chat template puts nothing before a user's message, so there is nothing to go on from; name "
            "the tokenizer of another one as synthesis.tokenizer."
        )
    _, behind = _around(encoder, [*opening, question, {"role": "assistant"}], told, generation=False)
    return ChatTurns(_stable(encoder, before), user_ends, _ending(encoder, behind))


def _around(encoder: Encoder, messages: list[dict[str, str]], where: str, generation: bool = True) -> tuple[str, str]:
    """What the template puts before and behind the text of the last message, whatever that is."""
    found = []
    for mark in _MARKS:
        marked = [*messages[:-1], messages[-1] | {"content": mark}]
        parts = encoder.render(marked, where, add_generation_prompt=generation).split(mark)
        if len(parts) != 2:
            raise InputError(
                f"{where}: the chat template has the {messages[-1]['role']}'s text {len(parts) - 1} times instead of "
                "once, as it is, so what precedes it cannot be told; name the tokenizer of another one as "
                "synthesis.tokenizer."
            )
        found.append((parts[0], parts[1]))
    if found[0] != found[1]:
        raise InputError(
            f"{where}: what the chat template puts around the {messages[-1]['role']}'s text depends on that text; name "
            "the tokenizer of another one as synthesis.tokenizer."
        )
    return found[0]


def _ending(encoder: Encoder, behind: str) -> str:
    """The first thing behind a turn that is no white space: a special token, or words."""
    behind = behind.strip()
    if not behind:
        return ""
    tokens = {str(encoder.tokenizer.convert_ids_to_tokens(number)) for number in encoder.special_ids}
    begun = [token for token in tokens if behind.startswith(token)]
    return max(begun, key=len) if begun else behind.splitlines()[0].strip()


def _stable(encoder: Encoder, before: str) -> str:
    """`before` without the spaces at its end that would be a part of the text's first token."""
    wholes = encoder.encode([before + beginning for beginning in _BEGINNINGS])
    for candidate in (before, before.rstrip(" ")):
        ids = encoder.encode([candidate])[0]
        if ids and all(whole[: len(ids)] == ids for whole in wholes):
            return candidate
    return before
