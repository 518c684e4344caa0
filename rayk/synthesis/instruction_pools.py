"""Tables that recipe `adversarial` (Lion, `rayk.synthesis.adversarial`) writes to a round's folder, as Parquet files.

They are the pools, `train_pool` and `cache_pool`, and the comparisons of teacher and student on the previous round's
cache pool, `comparisons`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import pyarrow as pa
import pyarrow.parquet as pq

from rayk.errors import RunFailed
from rayk.synthesis.adversarial_texts import Scores
from rayk.synthesis.store import CompletionStore, rows_to_table

TRAIN, CACHE, COMPARISONS = "train_pool", "cache_pool", "comparisons"
GIVEN, HARD, EASY, UNSCORED = "given", "hard", "easy", "unscored"

_SCHEMA = pa.schema(
    [
        ("instruction", pa.string()),
        ("kind", pa.string()),
        ("round", pa.int32()),
        ("origin", pa.int64()),
        ("made_from", pa.string()),
        ("answer", pa.string()),
    ]
)


@dataclass(frozen=True)
class PoolEntry:
    """An instruction of a pool. The attributes are the columns of the file.

    Attributes:
        kind: 'given', or 'hard' or 'easy' for the kind of instruction that it was generated from.
        round: round in which it entered the pools.
        origin: index of the given prompt that it is or descends from.
        made_from: instruction that it was generated from; empty if given.
        answer: the teacher's completion; None if there is none yet.
    """

    instruction: str
    kind: str
    round: int
    origin: int
    made_from: str = ""
    answer: str | None = None


@dataclass(frozen=True)
class AnswerComparison:
    """The teacher's and the student's completion of an instruction of the cache pool, and the referee's scores.

    Attributes:
        scores: scores of teacher and student, first with the teacher's completion shown first, then with the student's;
            None if the referee gave none. Empty if the referee was not queried.
        reason: why scores are missing.
    """

    entry: PoolEntry
    teacher: str
    student: str
    scores: tuple[Scores | None, ...] = ()
    reason: str = ""

    @property
    def leads(self) -> list[float]:
        """Score difference teacher − student, for each order with scores."""
        return [teacher - student for teacher, student in filter(None, self.scores)]

    @property
    def lead(self) -> float | None:
        """Mean score difference d over both orders; None if one is missing."""
        return fmean(self.leads) if len(self.leads) == 2 else None

    @property
    def depends_on_order(self) -> bool:
        """Whether a different completion wins in each order."""
        return len(self.leads) == 2 and self.leads[0] * self.leads[1] < 0

    def kind(self, threshold: float) -> str:
        """Return 'hard', 'easy' or 'unscored'."""
        if self.lead is None:
            return UNSCORED
        return HARD if self.lead >= threshold else EASY


def write_pool(store: CompletionStore, name: str, entries: Iterable[PoolEntry]) -> None:
    """Write a pool to a round's folder."""
    store.write_table(name, pa.Table.from_pylist([asdict(entry) for entry in entries], _SCHEMA))


def read_pool(folder: Path, name: str) -> list[PoolEntry]:
    """Read a pool from a round's folder.

    Raises:
        RunFailed: the file is missing or damaged.
    """
    path = folder / f"{name}.parquet"
    try:
        rows = pq.read_table(path, schema=_SCHEMA, page_checksum_verification=True).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise RunFailed(
            f"The pool '{path}' of the previous round cannot be read ({str(error).splitlines()[0]}); delete "
            f"'{folder / 'summary.json'}' and '{folder.parent / 'summary.json'}' and continue with --resume: that "
            "round's rows and pools are then made again from the stored completions."
        ) from error
    return [PoolEntry(**row) for row in rows]


def write_comparisons(store: CompletionStore, comparisons: Sequence[AnswerComparison], threshold: float) -> None:
    """Write the comparisons to a round's folder."""
    rows = [
        {
            "instruction": comparison.entry.instruction,
            "kind": comparison.kind(threshold),
            "lead": comparison.lead,
            "scores_teacher_first": comparison.scores[0] if comparison.scores else None,
            "scores_student_first": comparison.scores[1] if comparison.scores else None,
            "teacher_answer": comparison.teacher,
            "student_answer": comparison.student,
            "reason": comparison.reason,
        }
        for comparison in comparisons
    ]
    store.write_table(COMPARISONS, rows_to_table(rows))
