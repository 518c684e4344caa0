"""Rows in the tokens of a teacher with another tokenizer, aligned with the student's tokens by bytes of the text.

A *group* is a minimal run of student tokens and the run of teacher tokens that covers the same bytes. A boundary
between two groups is a byte offset at which a token ends on both sides, so every byte of the text is in exactly one
group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayk.signals.sequence import TokenSequence


@dataclass(frozen=True, eq=False)
class VocabularyMap:
    """Tokens that stand for the same text in two vocabularies; each token has at most one partner.

    Attributes:
        student: int64 [shared], the student's ids.
        teacher: int64 [shared], the teacher's ids of the same texts.
        student_size: number of tokens in the student's vocabulary.
        teacher_size: number of tokens in the teacher's vocabulary.
    """

    student: np.ndarray
    teacher: np.ndarray
    student_size: int
    teacher_size: int


@dataclass(frozen=True, eq=False)
class TokenGroups:
    """Groups of a row's tokens, in the order of the text, by counted index: 0 is the row's first counted token.

    Attributes:
        student: int64 [groups, 2], first student token of each group, and the one after its last.
        teacher: int64 [groups, 2], the same for the teacher's tokens.
        is_single: bool [groups], True for one token on each side, with the same text: student and teacher choose the
            next token at the same place, so their distributions can be compared.
    """

    student: np.ndarray
    teacher: np.ndarray
    is_single: np.ndarray

    def __len__(self) -> int:
        return len(self.is_single)


@dataclass(frozen=True, eq=False)
class AlignedView:
    """A row as a teacher with another tokenizer reads it.

    Attributes:
        sequence: the row in the teacher's tokens; its counted tokens are those of the groups.
        groups: the alignment with the student's tokens.
        vocabulary: the tokens that both vocabularies contain.
    """

    sequence: TokenSequence
    groups: TokenGroups
    vocabulary: VocabularyMap


def group_by_bytes(student_lengths: Sequence[int], teacher_lengths: Sequence[int]) -> np.ndarray:
    """Group the tokens of two tokenizations of one text.

    Args:
        student_lengths: number of bytes of each student token.
        teacher_lengths: number of bytes of each teacher token. If one side covers fewer bytes, its missing bytes are in
            no group.

    Returns:
        int64 [groups, 4]: first student token, the one after the last, and the same for the teacher's tokens. A token
        without bytes belongs to the group after it.
    """
    student_ends, teacher_ends = np.cumsum(student_lengths), np.cumsum(teacher_lengths)
    shared = np.intersect1d(student_ends, teacher_ends)
    shared = shared[shared > 0]
    columns = []
    for ends in (student_ends, teacher_ends):
        after_last = np.searchsorted(ends, shared, side="left") + 1
        columns += [np.concatenate([[0], after_last[:-1]])[: len(shared)], after_last]
    return np.stack(columns, axis=1).astype(np.int64).reshape(-1, 4)
