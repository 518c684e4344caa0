"""The tokens that a model knows, and in what two models' vocabularies differ.

A model's *real vocabulary* are the ids that its tokenizer gives to tokens and that its embedding has. An embedding is
often padded past the tokenizer's last id. Rarely it is smaller: Gemma 3 1B lacks the tokenizer's image token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rayk.errors import InputError
from rayk.models.fingerprint import real_vocab_size

_SHOWN = 5


@dataclass(frozen=True)
class Vocabulary:
    """A model's real vocabulary.

    Attributes:
        tokens: the token of each id.
        added: ids of tokens that were added to the tokenizer's trained ones, such as marks of a chat template.
        size: the highest id plus 1.
    """

    tokens: Mapping[int, str]
    added: frozenset[int]
    size: int


def read_vocabulary(tokenizer: Any, model_size: int | None = None) -> Vocabulary:
    """Return the real vocabulary of a tokenizer and a model whose embedding has `model_size` rows (None: all ids)."""
    size = real_vocab_size(tokenizer)
    size = size if model_size is None else min(size, model_size)
    tokens = {number: token for token, number in tokenizer.get_vocab().items() if number < size}
    added = frozenset(number for number in getattr(tokenizer, "added_tokens_decoder", {}) if number < size)
    return Vocabulary(tokens, added, size)


def check_embedding(tokenizer: Any, model_size: int, name: str) -> None:
    """Check that an embedding of `model_size` rows has all tokens of the tokenizer but added ones.

    Added tokens that the embedding lacks are allowed here, because most texts do not contain them; rows that do are
    refused later.

    Raises:
        InputError: trained tokens are missing in the embedding.
    """
    size = real_vocab_size(tokenizer)
    if size <= model_size:
        return
    added = getattr(tokenizer, "added_tokens_decoder", {})
    if any(number >= model_size and number not in added for number in tokenizer.get_vocab().values()):
        raise InputError(
            f"The student's vocabulary ({model_size}) is smaller than its tokenizer's ({size}); set student.tokenizer "
            f"to the tokenizer of '{name}', or set student.config.vocab_size."
        )


@dataclass(frozen=True)
class VocabularyDifference:
    """In what the vocabularies of student and teacher differ, if tokens that both have in common have the same ids.

    Attributes:
        shared: number of leading ids that both models have. At these, both have the same tokens, except for `renamed`
            ones and for added tokens that one of the two lacks.
        student_lacks, teacher_lacks: the tokens that only the other one has, by id.
        renamed: (student's, teacher's) name of added tokens that have different names at the same id.
    """

    shared: int
    student_lacks: Mapping[int, str]
    teacher_lacks: Mapping[int, str]
    renamed: Mapping[int, tuple[str, str]]

    def __bool__(self) -> bool:
        return bool(self.student_lacks or self.teacher_lacks or self.renamed)

    def __str__(self) -> str:
        """Return the differences as a clause."""
        parts = []
        if self.student_lacks:
            parts.append(f"has {_count(self.student_lacks)} that the student lacks ({_list(self.student_lacks)})")
        if self.teacher_lacks:
            parts.append(f"lacks {_count(self.teacher_lacks)} that the student has ({_list(self.teacher_lacks)})")
        if self.renamed:
            names = {number: f"{theirs} for {ours}" for number, (ours, theirs) in self.renamed.items()}
            parts.append(f"has other names for {_count(names)} of the student ({_list(names)})")
        return ", ".join(parts)


def compare_vocabularies(student: Vocabulary, teacher: Vocabulary) -> VocabularyDifference:
    """Compare two vocabularies whose shared ids have the same tokens.

    Added tokens may differ in their names at the same id, and either side may lack some.

    Raises:
        InputError: a token has different ids; the message is a clause, for a sentence about the two models.
    """
    ids_of_student = {token: number for number, token in student.tokens.items()}
    renamed: dict[int, tuple[str, str]] = {}
    for number, token in sorted(teacher.tokens.items()):
        own = ids_of_student.get(token)
        if own == number:
            continue
        if own is not None:
            raise InputError(f"'{token}' has id {number} for the teacher and {own} for the student")
        if number in student.tokens:
            if not (number in student.added and number in teacher.added):
                raise InputError(
                    f"id {number} is '{token}' for the teacher and '{student.tokens[number]}' for the student"
                )
            renamed[number] = student.tokens[number], token
    return VocabularyDifference(
        shared=min(student.size, teacher.size),
        student_lacks=_missing(teacher, student),
        teacher_lacks=_missing(student, teacher),
        renamed=dict(sorted(renamed.items())),
    )


def _missing(has: Vocabulary, lacks: Vocabulary) -> dict[int, str]:
    return {number: token for number, token in sorted(has.tokens.items()) if number not in lacks.tokens}


def _count(tokens: Mapping[int, Any]) -> str:
    return "1 token" if len(tokens) == 1 else f"{len(tokens):,} tokens"


def _list(tokens: Mapping[int, str]) -> str:
    shown = ", ".join(list(tokens.values())[:_SHOWN])
    return f"{shown}, …" if len(tokens) > _SHOWN else shown
