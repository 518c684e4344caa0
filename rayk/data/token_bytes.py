"""The bytes that each token of a tokenizer stands for, and the tokens that two tokenizers share."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from rayk.errors import InputError
from rayk.signals.alignment import VocabularyMap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPACE = "▁"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """The bytes of every token, for byte-level BPE (GPT-2's alphabet) and SentencePiece (▁ for a space, `<0xE2>` for a
    byte).

    A special or added token stands for its own text.

    Attributes:
        pieces: the bytes of each token, by id; empty for an id without a token.
        special_ids: ids of special tokens.
        raw_byte_ids: ids of SentencePiece's byte tokens.

    Raises:
        InputError: the tokenizer is of another kind, so that the bytes of its tokens are unknown.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
        """
        Args:
            name: the tokenizer's name in error messages.
        """
        decoders = set(_decoder_types(tokenizer))
        is_byte_level = "ByteLevel" in decoders
        if not is_byte_level and not decoders & {"Metaspace", "ByteFallback", "Replace"}:
            raise InputError(
                f"The tokens of {name} cannot be aligned with another tokenizer's, because the bytes of its text that "
                "they stand for are not known (neither byte-level BPE nor SentencePiece); train on text that this "
                "teacher generates instead (synthesis 'responses' with method 'supervised')."
            )
        vocabulary = tokenizer.get_vocab()
        added = tokenizer.added_tokens_decoder
        marked = {number for number, token in added.items() if token.special}
        self.special_ids = marked | set(tokenizer.all_special_ids)
        self.raw_byte_ids: set[int] = set()
        self.pieces = [b""] * (max(vocabulary.values()) + 1)
        byte_of = _byte_alphabet() if is_byte_level else {}
        for token, number in vocabulary.items():
            if number in self.special_ids:
                self.pieces[number] = token.encode()
            elif is_byte_level:
                literal = number in added or not all(character in byte_of for character in token)
                self.pieces[number] = token.encode() if literal else bytes(byte_of[character] for character in token)
            elif (match := _BYTE_TOKEN.fullmatch(token)) and "ByteFallback" in decoders:
                self.raw_byte_ids.add(number)
                self.pieces[number] = bytes([int(match[1], 16)])
            else:
                self.pieces[number] = token.replace(_SPACE, " ").encode()

    def of(self, ids: Iterable[int]) -> list[bytes]:
        """Return the bytes of each of the tokens."""
        return [self.pieces[number] for number in ids]


def shared_vocabulary(student: TokenBytes, teacher: TokenBytes, ends: tuple[int, int]) -> VocabularyMap:
    """Return the tokens with the same bytes on both sides, and the special tokens with the same text.

    Where a vocabulary has several tokens with the same bytes (SentencePiece: a character and its byte token), the first
    ones are partners, then the second ones, and so on; a byte token is always the last.

    Args:
        ends: the tokens that end a completion, the student's and the teacher's; they are partners whatever their texts.
    """
    partners = {key: number for key, number in _keys(teacher) if number != ends[1]}
    pairs = [(number, partners[key]) for key, number in _keys(student) if number != ends[0] and key in partners]
    both = np.array(sorted([*pairs, ends]), dtype=np.int64).reshape(-1, 2)
    return VocabularyMap(both[:, 0].copy(), both[:, 1].copy(), len(student.pieces), len(teacher.pieces))


def _keys(tokens: TokenBytes) -> Iterator[tuple[Any, int]]:
    """Yield a key and the id of each token; tokens of two vocabularies are partners if their keys are equal."""
    seen: Counter[Any] = Counter()
    for number in sorted(range(len(tokens.pieces)), key=lambda number: (number in tokens.raw_byte_ids, number)):
        if not tokens.pieces[number]:
            continue
        text = (number in tokens.special_ids, tokens.pieces[number])
        yield (*text, seen[text]), number
        seen[text] += 1


def _decoder_types(tokenizer: "PreTrainedTokenizerBase") -> Iterator[str]:
    """Yield the types of the steps by which the tokenizer turns tokens into text; none for an unknown tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return
    decoder = json.loads(backend.decoder.__getstate__())
    for step in decoder.get("decoders", [decoder]):
        if step["type"] != "Replace" or (step["pattern"], step["content"]) == ({"String": _SPACE}, " "):
            yield step["type"]


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each character in the tokens of byte-level BPE."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}
