"""What Lion (`rayk.synthesis.adversarial`) keeps in a round's folder beside its rows, each a Parquet file: the pools,
`train_pool` and `cache_pool`, and how teacher and student compared on the cache pool of the round before,
`comparisons`."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import pyarrow as pa
import pyarrow.parquet as pq

from rayk.errors import RunFailed
from rayk.synthesis.adversarial_texts import Scores
from rayk.synthesis.store import CompletionStore, table_of

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
    """An instruction of a pool.

    Attributes:
        kind: 'given', or what the one was that it is made from: 'hard' or 'easy'.
        round: in which it came into the pools.
        origin: the place of the given prompt that it is or goes back to.
        made_from: the instruction that it is made from; empty where it is given.
        answer: the teacher's; None while there is none.
    """

    instruction: str
    kind: str
    round: int
    origin: int
    made_from: str = ""
    answer: str | None = None


@dataclass(frozen=True)
class AnswerComparison:
    """A teacher's and a student's answer to an instruction of the cache pool, and what a referee thought of them.

    Attributes:
        scores: of teacher and student, with the teacher's answer shown first, and with the student's; None where the
        referee gave none. Empty where it was not asked.
        reason: why there are not both.
    """

    entry: PoolEntry
    teacher: str
    student: str
    scores: tuple[Scores | None, ...] = ()
    reason: str = ""

    @property
    def leads(self) -> list[float]:
        """By how much the teacher's answer is better, in each order in which there are scores."""
        return [teacher - student for teacher, student in filter(None, self.scores)]

    @property
    def lead(self) -> float | None:
        """d: the mean over both orders; None unless there are both."""
        return fmean(self.leads) if len(self.leads) == 2 else None

    @property
    def depends_on_order(self) -> bool:
        """Whether each order makes another answer the better one."""
        return len(self.leads) == 2 and self.leads[0] * self.leads[1] < 0

    def kind(self, threshold: float) -> str:
        """'hard', 'easy' or 'unscored'."""
        if self.lead is None:
            return UNSCORED
        return HARD if self.lead >= threshold else EASY


def write_pool(store: CompletionStore, name: str, entries: Iterable[PoolEntry]) -> None:
    """Put a pool into a round's folder, whole or not at all."""
    store.put(name, pa.Table.from_pylist([asdict(each) for each in entries], _SCHEMA))


def read_pool(folder: Path, name: str) -> list[PoolEntry]:
    """A pool of the round whose folder this is.

    Raises:
        RunFailed: it is not there, or damaged.
    """
    path = folder / f"{name}.parquet"
    try:
        rows = pq.read_table(path, schema=_SCHEMA, page_checksum_verification=True).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise RunFailed(
            f"The pool '{path}' of the round before cannot be read ({str(error).splitlines()[0]}); delete "
            f"'{folder / 'summary.json'}' and '{folder.parent / 'summary.json'}' and go on with --resume: that round's "
            "rows and pools are made anew from what was written."
        ) from error
    return [PoolEntry(**row) for row in rows]


def write_comparisons(store: CompletionStore, comparisons: Sequence[AnswerComparison], threshold: float) -> None:
    """Put them into the round's folder, whole or not at all."""
    rows = [
        {
            "instruction": each.entry.instruction,
            "kind": each.kind(threshold),
            "lead": each.lead,
            **dict(zip(("scores_teacher_first", "scores_student_first"), each.scores or (None, None), strict=True)),
            "teacher_answer": each.teacher,
            "student_answer": each.student,
            "reason": each.reason,
        }
        for each in comparisons
    ]
    store.put(COMPARISONS, table_of(rows))
