"""Part `preferences` of `black_box`: DPO on answers of teacher and student, against supervision on the teacher's
answers.

The task is `purse`, the teacher that of `reasoning` with greedy generation. Students start after 600 updates on 600
people's workings, and there are 600 new questions. They make 150 updates of 64 rows or pairs:

- `seqkd_on`: supervised on the teacher's answers;
- `right_first`: DPO (β 0.1) on pairs of the teacher's answer and one that the student samples at temperature 0.7 when
  the round begins, where exactly one is right and chosen; two rounds of 75 updates, or one of 150 (`right_first_1`);
- `right_of_5`: the best against the worst of the teacher's answer and four of the student's; of equals the student's;
- `right_first_beside`: `right_first` with supervision on the chosen answers (`chosen_weight` 1).

Learning rates are 2e-5, 2e-4, 2e-3. The default of `preferences`, the teacher's answer as chosen whether or not the
student's is right, was tried in a pilot only (300 updates at 1e-4, 5e-4, 2e-3) and did no better.
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
from tests.benchmarks.learning.harness import Comparison, Part, cache_folder, run_config, train_model_once
from tests.benchmarks.learning.reasoning import (
    ANSWER,
    SLIPS,
    STUDENT_COLUMNS,
    STUDENT_MODEL,
    STUDENT_TRAINING,
    TEACHER,
    TUNING_SEED,
    evaluation_settings,
    make_completion,
    make_row,
    make_teacher,
    measure_accuracy,
    measure_teacher,
    split_questions,
    student_measures,
)
from tests.benchmarks.learning.words import make_tokenizer, write_rows

BEFORE = {**STUDENT_TRAINING, "learning_rate": 3e-3}
BEFORE_QUESTIONS, QUESTIONS, UPDATES = 600, 600, 150
TRAINING = {"batch_size": 64, "warmup_steps": 10}
LEARNING_RATES = (2e-5, 2e-4, 2e-3)
LAST = 10

_TEACHER_SAMPLING: dict[str, Any] = {"sampling": {"max_new_tokens": 18, "temperature": 0.0}}
_STUDENT_SAMPLING = {
    "student_sampling": {"max_new_tokens": 18, "temperature": 0.7},
    "student": {"resources": {"num_cpus": 0.5}},
}
_RIGHT_FIRST = {"kind": "preferences", "chosen": "best", "answer": ANSWER, **_TEACHER_SAMPLING, **_STUDENT_SAMPLING}
_DPO: dict[str, Any] = {"kind": "preference"}
PREFERENCES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "seqkd_on": ({"kind": "responses", **_TEACHER_SAMPLING}, {"kind": "supervised"}, 1),
    "right_first_1": (_RIGHT_FIRST, _DPO, 1),
    "right_first": (_RIGHT_FIRST, _DPO, 2),
    "right_of_5": (_RIGHT_FIRST | {"student_samples": 4}, _DPO, 2),
    "right_first_beside": (_RIGHT_FIRST, _DPO | {"chosen_weight": 1.0}, 2),
}
"""For each method: the synthesis, the method that learns from its rows, and the number of rounds."""


def _run(method: str, seed: int, rate: float) -> dict[str, Any]:
    synthesis, learning, rounds = PREFERENCES[method]
    asked, held_out = split_questions(seed, BEFORE_QUESTIONS + QUESTIONS)
    questions = asked[BEFORE_QUESTIONS:]
    rows = [{"prompt": f"{question} ###", "answer": purse.answer_to(question)} for question in questions]
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        given = {"path": str(write_rows(home / "train.jsonl", rows))}
        config = run_config(
            home / "run", {"model": str(_make_start(seed))}, given, seed, learning,
            {**TRAINING, "steps": UPDATES // rounds, "learning_rate": rate}, rounds=rounds, synthesis=synthesis,
            teachers=[{"name": TEACHER, "attach": True}], **evaluation_settings(home, held_out),
        )  # fmt: skip
        result = distill(config)
        return {
            **student_measures(result.summary), "before": _start_accuracy(seed), **_round_measures(result),
            "seconds": result.summary["seconds"],
        }  # fmt: skip


def _round_measures(result: Result) -> dict[str, float]:
    """Return the number of rows of the last round, and the log-prob gains of both kinds of answers over all rounds."""
    folders = sorted(result.output.glob("rounds/*")) or [result.output]
    rows = pq.read_table(folders[-1] / "synthesis" / "rows.parquet").num_rows
    gained = [logprob_gains(read_lines(folder / "metrics.jsonl")) for folder in folders]
    return {"rows": rows, **{name: sum(gain[name] for gain in gained) for name in gained[0]}}


def logprob_gains(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return by how many nats whole answers became more likely than under the reference, over a round's last steps."""
    if "chosen_reward" not in steps[-1]:
        return {}
    beta = PreferenceConfig().beta
    return {
        f"{kind}_gained": statistics.mean(step[f"{kind}_reward"] for step in steps[-LAST:]) / beta
        for kind in ("chosen", "rejected")
    }


@cache
def _start_accuracy(seed: int) -> float:
    """Return the accuracy of the student from which all methods of a seed start."""
    return measure_accuracy(_make_start(seed), split_questions(seed, BEFORE_QUESTIONS + QUESTIONS)[1])


def _make_start(seed: int) -> Path:
    """Return the student from which all methods of a seed start; it has learned from people's workings."""
    draw = random.Random(seed)
    questions = split_questions(seed, BEFORE_QUESTIONS + QUESTIONS)[0][:BEFORE_QUESTIONS]
    rows = [make_row(question, make_completion(purse.make_working(question, draw, SLIPS))) for question in questions]
    home = cache_folder("black-box-preferring", purse, [STUDENT_MODEL, BEFORE, BEFORE_QUESTIONS, QUESTIONS]) / str(seed)
    return train_model_once(home, make_tokenizer(purse.WORDS), STUDENT_MODEL, rows, seed, **BEFORE) / "model"


PREFERENCES_PART = Part(
    Comparison(
        methods=list(PREFERENCES), rates=LEARNING_RATES, tuning_seed=TUNING_SEED,
        columns=STUDENT_COLUMNS | {
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
    TEACHER, make_teacher, measure_teacher, _run,
)  # fmt: skip
