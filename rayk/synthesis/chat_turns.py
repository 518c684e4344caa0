"""Find where the turns of a chat template begin and end, by rendering marked messages.

If a model that was trained on a template reads only the text before the user's message, it continues with a user's
message (Magpie). That text, and the text that ends the turn, differ between templates:

    Llama-3   <|begin_of_text|><|start_header_id|>user<|end_header_id|>⏎⏎ … <|eot_id|>
    Qwen2.5   <|im_start|>system⏎You are Qwen, … <|im_end|>⏎<|im_start|>user⏎ … <|im_end|>⏎
    Gemma-2   <bos><start_of_turn>user⏎ … <end_of_turn>⏎
    Mistral   <s>[INST] … [/INST]
"""

from dataclasses import dataclass

from rayk.data.text_encoder import TextEncoder
from rayk.errors import InputError

# Letters only, because templates may strip, escape or search for other characters.
_MARKS = ("Xqzwoven", "Vjkhollow")
_BEGINNINGS = ("The", "What", "I", "1", "Über", "请")


@dataclass(frozen=True)
class ChatTurns:
    """Text around the messages of a chat template.

    Attributes:
        user_begins: all text before the user's message, including the system's turn.
        user_ends, assistant_ends: text that ends the turn: a special token or, without one, the first words after the
            message. For the assistant it may be empty: then only the model's end-of-text token ends the turn.
    """

    user_begins: str
    user_ends: str
    assistant_ends: str


def find_chat_turns(encoder: TextEncoder, system: str | None, where: str) -> ChatTurns:
    """Return the turns of the tokenizer's chat template, after a system prompt if one is given.

    Args:
        where: beginning of error messages ("teacher 'big'").

    Raises:
        InputError: there is no template, it accepts no system prompt, or it does not mark where a user's turn begins
            and ends.
    """
    if not encoder.tokenizer.chat_template:
        raise InputError(
            f"{where} has no chat template in its tokenizer, which magpie requires; set synthesis.tokenizer to the "
            "tokenizer of a chat model, or use a chat model as teacher."
        )
    opening = [] if system is None else [{"role": "system", "content": system}]
    where_system = f"{where}{'' if system is None else ', with synthesis.system'}"
    before, after = _around(encoder, [*opening, {"role": "user"}], where_system)
    user_ends = _ending(encoder, after)
    if not user_ends:
        raise InputError(
            f"{where_system}: the chat template has no text after a user's message that would end an instruction; set "
            "synthesis.tokenizer to a tokenizer with another template."
        )
    question = {"role": "user", "content": "?"}
    if system is not None and system.strip() not in before:
        raise InputError(f"{where_system}: the chat template ignores a system prompt; remove synthesis.system.")
    if not before.strip():
        raise InputError(
            f"{where_system}: the chat template has no text before a user's message to continue from; set "
            "synthesis.tokenizer to a tokenizer with another template."
        )
    _, after = _around(encoder, [*opening, question, {"role": "assistant"}], where_system, generation=False)
    return ChatTurns(_strip_unstable_spaces(encoder, before), user_ends, _ending(encoder, after))


def _around(
    encoder: TextEncoder, messages: list[dict[str, str]], where: str, generation: bool = True
) -> tuple[str, str]:
    """Return the template's text before and after the content of the last message, which must not depend on it."""
    found = []
    for mark in _MARKS:
        marked = [*messages[:-1], messages[-1] | {"content": mark}]
        parts = encoder.chat_template.render(marked, where, add_generation_prompt=generation).split(mark)
        if len(parts) != 2:
            raise InputError(
                f"{where}: the chat template contains the {messages[-1]['role']}'s text {len(parts) - 1} times instead "
                "of once and unchanged; set synthesis.tokenizer to a tokenizer with another template."
            )
        found.append((parts[0], parts[1]))
    if found[0] != found[1]:
        raise InputError(
            f"{where}: the chat template's text around the {messages[-1]['role']}'s text depends on that text; set "
            "synthesis.tokenizer to a tokenizer with another template."
        )
    return found[0]


def _ending(encoder: TextEncoder, after: str) -> str:
    """Return what a turn ends with: the special token that follows it, or the first line that is not blank."""
    after = after.strip()
    if not after:
        return ""
    tokens = {str(encoder.tokenizer.convert_ids_to_tokens(number)) for number in encoder.special_ids}
    matching = [token for token in tokens if after.startswith(token)]
    return max(matching, key=len) if matching else after.splitlines()[0].strip()


def _strip_unstable_spaces(encoder: TextEncoder, before: str) -> str:
    """Return `before` without spaces at its end that would become part of the message's first token."""
    wholes = encoder.encode([before + beginning for beginning in _BEGINNINGS])
    for candidate in (before, before.rstrip(" ")):
        ids = encoder.encode([candidate])[0]
        if ids and all(whole[: len(ids)] == ids for whole in wholes):
            return candidate
    return before
