"""The vocabularies of a run's student and teachers: which token ids all of them have, and in what they differ.

Teachers whose tokens have the student's ids, and that lack some tokens or have more, can be compared with the student:
signals are over the shared ids, and the probability of all other tokens is the tail.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from rayk.config import RunConfig, TeacherConfig
from rayk.data.examples import ExampleTable
from rayk.errors import InputError
from rayk.models import load_model_config, load_tokenizer, tokenizer_fingerprint
from rayk.models.tokenization import tokenization_differences
from rayk.models.vocabulary import Vocabulary, VocabularyDifference, compare_vocabularies, read_vocabulary
from rayk.teachers import Teacher

_WAYS_OUT = (
    "methods that compare distributions need the same ids. Set student.tokenizer to the teacher's tokenizer if the "
    "student may learn the teacher's tokens, set method.alignment, or let the teacher generate the training rows "
    "('synthesis') with method 'supervised'"
)


@dataclass(frozen=True)
class SharedVocabulary:
    """The token ids that the student and all teachers of a run have in common."""

    student: Vocabulary
    size: int
    """Number of leading ids that all have in their vocabularies."""
    differences: Mapping[str, VocabularyDifference] = field(default_factory=dict)
    """By the teacher's name; equal vocabularies are left out."""
    teacher_sizes: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """Sentences on what differs, for the user."""

    def limit_teachers(self, config: RunConfig) -> RunConfig:
        """Return the settings, in which teachers with more tokens return signals of the shared ones only."""
        teachers = [
            teacher.model_copy(update={"vocab_size": self.size})
            if self.teacher_sizes.get(teacher.name, 0) > self.size and not teacher.attach
            else teacher
            for teacher in config.teachers
        ]
        return config.model_copy(update={"teachers": teachers})

    @property
    def generated(self) -> int | None:
        """Number of leading ids that rollouts may contain; None for all of the student's."""
        return self.size if self.size < self.student.size else None

    def check_rows(self, tables: Iterable[ExampleTable], tokenizer: Any) -> None:
        """Check that student and teachers have all tokens of the rows.

        Raises:
            InputError: a row contains a token that one of them lacks.
        """
        lacks = {name: np.fromiter(one.teacher_lacks, int) for name, one in self.differences.items()}
        for table in tables:
            self._check_rows_of(table, "The student", np.zeros(0, int), tokenizer)
            for name, ids in lacks.items():
                self._check_rows_of(table, f"Teacher '{name}'", ids, tokenizer)

    def _check_rows_of(self, table: ExampleTable, reader: str, lacked: np.ndarray, tokenizer: Any) -> None:
        found = table.find_token(lambda ids: (ids >= self.student.size) | np.isin(ids, lacked))
        if found is None:
            return
        where, number = found
        raise InputError(
            f"{where} contains the token '{tokenizer.convert_ids_to_tokens(number)}' (id {number}), which "
            f"{reader[0].lower()}{reader[1:]} lacks; remove such rows or the token, or use a model that has it."
        )

    def describe_rows(self, table: ExampleTable) -> list[str]:
        """Return sentences on tokens of the rows that have another name in a teacher's vocabulary."""
        sentences = []
        for name, difference in self.differences.items():
            found = table.find_token(partial(np.isin, test_elements=np.fromiter(difference.renamed, int)))
            if found is not None:
                own, theirs = difference.renamed[found[1]]
                sentences.append(
                    f"{found[0]} contains '{own}', which is '{theirs}' to teacher '{name}'; if these do not mean the "
                    "same, set student.tokenizer to the teacher's tokenizer, or data.chat_template to its template."
                )
        return sentences


def share_vocabularies(
    config: RunConfig, attached: Mapping[str, Teacher], tokenizer: Any, tokenizer_name: str, student_size: int
) -> SharedVocabulary:
    """Compare the vocabularies of the teachers that return signals with the student's.

    Args:
        student_size: rows of the student's embedding.

    Raises:
        InputError: a teacher returns no signals, or gives tokens other ids than the student.
    """
    shared = SharedVocabulary(student := read_vocabulary(tokenizer, student_size), student.size)
    differences: dict[str, VocabularyDifference] = {}
    sizes: dict[str, int] = {}
    notes: list[str] = []
    for teacher in config.signal_teachers:
        if teacher.name == config.aligned_teacher:
            continue
        vocabulary, teacher_tokenizer = _read_teacher(teacher, attached.get(teacher.name), tokenizer, student)
        try:
            difference = compare_vocabularies(student, vocabulary)
        except InputError as error:
            raise InputError(
                f"Teacher '{teacher.name}' and the student's tokenizer '{tokenizer_name}' give tokens different ids "
                f"({error}); {_WAYS_OUT}."
            ) from error
        sizes[teacher.name] = vocabulary.size
        if difference:
            differences[teacher.name] = difference
            notes.append(f"Teacher '{teacher.name}' {difference}; signals are over the ids that both have.")
        if texts := tokenization_differences(tokenizer, teacher_tokenizer):
            notes.append(
                f"Teacher '{teacher.name}' was trained with another tokenizer than '{tokenizer_name}': "
                f"{'; '.join(texts)}. It reads the student's tokens."
            )
    shared = replace(
        shared, size=min([student.size, *sizes.values()]), differences=differences, teacher_sizes=sizes,
        notes=tuple(notes),
    )  # fmt: skip
    _check_attached(shared, attached)
    return shared


def _read_teacher(
    teacher: TeacherConfig, running: Teacher | None, tokenizer: Any, student: Vocabulary
) -> tuple[Vocabulary, Any]:
    """Return a teacher's vocabulary and its tokenizer."""
    if teacher.follows == "student":
        return student, tokenizer
    if running is None:
        assert teacher.model is not None
        own = load_tokenizer(teacher.model, trust_remote_code=teacher.trust_remote_code)
        settings = load_model_config(teacher.model, trust_remote_code=teacher.trust_remote_code).get_text_config()
        sizes = [size for size in (getattr(settings, "vocab_size", None), teacher.vocab_size) if size is not None]
        return read_vocabulary(own, min(sizes, default=None)), own
    info = running.info
    if info.engine == "openai":
        raise InputError(
            f"Teacher '{teacher.name}' is an endpoint, which generates text and returns no signals, and this run "
            "generates nothing with it; remove it from 'teachers', or name it in 'synthesis'."
        )
    own = tokenizer
    if info.tokenizer_fingerprint != tokenizer_fingerprint(tokenizer):
        try:
            own = load_tokenizer(info.model, trust_remote_code=teacher.trust_remote_code)
        except InputError as error:
            raise InputError(
                f"The running teacher '{teacher.name}' has another vocabulary than the student, and its tokenizer "
                f"cannot be compared: {error}"
            ) from error
    return read_vocabulary(own, info.vocab_size), own


def _check_attached(shared: SharedVocabulary, attached: Mapping[str, Teacher]) -> None:
    for name in attached:
        if (size := shared.teacher_sizes.get(name, 0)) > shared.size:
            raise InputError(
                f"The running teacher '{name}' returns signals of {size:,} tokens, but the models of this run share "
                f"only {shared.size:,}; serve it with teachers.vocab_size: {shared.size}."
            )
