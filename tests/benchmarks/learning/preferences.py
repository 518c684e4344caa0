"""The black-box comparison's part `preferences`: direct preference optimisation (DPO) on a teacher's answers and the
student's own, against further supervision on the teacher's.

The world is that of `purse`, the teacher that of `black_box_reckoning`; it writes greedily. Students begin as 600
updates on 600 people's workings have left them, and there are 600 new questions. They make 150 updates of 64 rows, or
pairs:

- `seqkd_on`: supervised on the teacher's answers;
- `right_first`: DPO (β 0.1) where of the teacher's answer and the student's, which it samples at 0.7 as it is when the
  round begins, just one is right, and that one is chosen; two rounds of 75 updates, or one of 150 (`right_first_1`);
- `right_of_5`: the best before the worst of the teacher's answer and four of the student's, of equals the student's;
- `right_first_beside`: `right_first` with supervision on the chosen answers beside (`chosen_weight` 1).

Rates are 2e-5, 2e-4, 2e-3. That the teacher's answer is preferred whether or not the student's is right, which is
`preferences`' default, was tried on a pilot alone (300 updates at 1e-4, 5e-4, 2e-3), and did no better.
"""

import random
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from rayk.config import PreferenceConfig
from rayk.report.run_directory import read_lines
from rayk.run import Result, distill
from tests.benchmarks.learning import purse
from tests.benchmarks.learning.harness import Comparison, Part, cache_folder, made, run_config
from tests.benchmarks.learning.reasoning import (
    ANSWER,
    OF_STUDENTS,
    SLIPS,
    STUDENT_MODEL,
    STUDENT_TRAINING,
    TEACHER,
    TUNING_SEED,
    accuracy_of,
    drawn,
    measured_by,
    of_student,
    row_of,
    said_of,
    teacher,
    teacher_measured,
)
from tests.benchmarks.learning.words import tokenizer_of, write_rows

BEFORE = {**STUDENT_TRAINING, "learning_rate": 3e-3}
BEFORE_QUESTIONS, QUESTIONS, UPDATES = 600, 600, 150
TRAINING = {"batch_size": 64, "warmup_steps": 10}
LEARNING_RATES = (2e-5, 2e-4, 2e-3)
LAST = 10

_TEACHERS: dict[str, Any] = {"sampling": {"max_new_tokens": 18, "temperature": 0.0}}
_OWN = {"student_sampling": {"max_new_tokens": 18, "temperature": 0.7}, "student": {"resources": {"num_cpus": 0.5}}}
_RIGHT_FIRST = {"kind": "preferences", "chosen": "best", "answer": ANSWER, **_TEACHERS, **_OWN}
_DPO: dict[str, Any] = {"kind": "preference"}
PREFERENCES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "seqkd_on": ({"kind": "responses", **_TEACHERS}, {"kind": "supervised"}, 1),
    "right_first_1": (_RIGHT_FIRST, _DPO, 1),
    "right_first": (_RIGHT_FIRST, _DPO, 2),
    "right_of_5": (_RIGHT_FIRST | {"student_samples": 4}, _DPO, 2),
    "right_first_beside": (_RIGHT_FIRST, _DPO | {"chosen_weight": 1.0}, 2),
}
"""Of each method what is written, how it is learned from, and in how many rounds."""


def _run(method: str, seed: int, rate: float) -> dict[str, Any]:
    synthesis, learned, rounds = PREFERENCES[method]
    asked, held_out = drawn(seed, BEFORE_QUESTIONS + QUESTIONS)
    questions = asked[BEFORE_QUESTIONS:]
    rows = [{"prompt": f"{question} ###", "answer": purse.answer_to(question)} for question in questions]
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        given = {"path": str(write_rows(home / "train.jsonl", rows))}
        config = run_config(
            home / "run", {"model": str(_started(seed))}, given, seed, learned,
            {**TRAINING, "steps": UPDATES // rounds, "learning_rate": rate}, rounds=rounds, synthesis=synthesis,
            teachers=[{"name": TEACHER, "attach": True}], **measured_by(home, held_out),
        )  # fmt: skip
        result = distill(config)
        return {
            **of_student(result.summary), "before": _before(seed), **_of_rounds(result),
            "seconds": result.summary["seconds"],
        }  # fmt: skip


def _of_rounds(result: Result) -> dict[str, float]:
    """How many rows or pairs the last round had, and by how many nats the answers of both kinds became likelier in the
    rounds together."""
    folders = sorted(result.output.glob("rounds/*")) or [result.output]
    rows = pq.read_table(folders[-1] / "synthesis" / "rows.parquet").num_rows
    gained = [of_steps(read_lines(folder / "metrics.jsonl")) for folder in folders]
    return {"rows": rows, **{name: sum(each[name] for each in gained) for name in gained[0]}}


def of_steps(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """By how many nats whole answers of both kinds were likelier to a round's last steps than to its reference."""
    if "chosen_reward" not in steps[-1]:
        return {}
    beta = PreferenceConfig().beta
    return {
        f"{kind}_gained": statistics.mean(step[f"{kind}_reward"] for step in steps[-LAST:]) / beta
        for kind in ("chosen", "rejected")
    }


@cache
def _before(seed: int) -> float:
    """Right answers of the student that all methods of a seed begin with."""
    return accuracy_of(_started(seed), drawn(seed, BEFORE_QUESTIONS + QUESTIONS)[1])


def _started(seed: int) -> Path:
    """It has learned from people's workings, as in part `responses`."""
    draw = random.Random(seed)
    questions = drawn(seed, BEFORE_QUESTIONS + QUESTIONS)[0][:BEFORE_QUESTIONS]
    rows = [row_of(question, said_of(purse.working(question, draw, SLIPS))) for question in questions]
    home = cache_folder("black-box-preferring", purse, [STUDENT_MODEL, BEFORE, BEFORE_QUESTIONS, QUESTIONS]) / str(seed)
    return made(home, tokenizer_of(purse.WORDS), STUDENT_MODEL, rows, seed, **BEFORE) / "model"


PREFERENCES_PART = Part(
    Comparison(
        methods=list(PREFERENCES), rates=LEARNING_RATES, tuning_seed=TUNING_SEED,
        columns=OF_STUDENTS | {
            "before": ("right answers before", "{:.1%}"), "rows": ("rows of the last round", "{:,.0f}"),
            "chosen_gained": ("chosen answers' log-prob, nats", "{:+.1f}"),
            "rejected_gained": ("rejected answers'", "{:+.1f}"), "seconds": ("seconds", "{:.0f}"),
        },
        pairs=[
            *((method, "seqkd_on") for method in PREFERENCES if method != "seqkd_on"),
            ("right_first", "right_first_1"), ("right_of_5", "right_first"), ("right_first_beside", "right_first"),
        ],
        compared=("accuracy", "sound"),
    ),
    TEACHER, teacher, teacher_measured, _run,
)  # fmt: skip
