"""Write and read the evaluation of the student before its first update, two files in the run directory."""

import json
from collections.abc import Mapping
from pathlib import Path

from rayk.evaluation.evaluate import Evaluation
from rayk.storage.atomic import write_whole

_METRICS, _ANSWERS = "student_before.json", "answers_before.json"


def record_initial_evaluation(output: Path, evaluation: Evaluation) -> None:
    """Write the metrics and the first answer to each row; the metrics last, so that they imply the answers.

    Raises:
        RunFailed: the disk is full.
        InputError: the folder cannot be written.
    """
    if evaluation.answers:
        answers = {answer.where: answer.text for answer in reversed(evaluation.answers)}
        write_whole(output / _ANSWERS, json.dumps(answers, ensure_ascii=False).encode())
    write_whole(output / _METRICS, json.dumps(evaluation.metrics).encode())


def read_initial_metrics(output: Path) -> dict[str, float] | None:
    """Return the metrics of the untrained student; None if they were not measured."""
    return _read(output / _METRICS)


def read_initial_answers(output: Path) -> Mapping[str, str]:
    """Return the texts that the untrained student generated, by the place of the evaluation row."""
    return _read(output / _ANSWERS) or {}


def _read(path: Path):
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
