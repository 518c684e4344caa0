"""`summary.json`: the results of a finished run."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rayk.config import RunConfig
from rayk.evaluation.evaluate import Evaluation
from rayk.evaluation.initial import read_initial_answers, read_initial_metrics
from rayk.methods import resolve_method
from rayk.report.run_directory import read_lines, wait_seconds
from rayk.retrieval import retriever_summary
from rayk.run.inputs import Inputs
from rayk.storage.atomic import write_whole
from rayk.training import Outcome


def summarize_run(
    config: RunConfig, inputs: Inputs, outcome: Outcome, teacher: Evaluation | None, seconds: float
) -> dict[str, Any]:
    """Return the content of `summary.json`.

    Args:
        teacher: the teacher's evaluation, if it was measured.
        seconds: duration of training and evaluation.
    """
    assert inputs.train is not None and outcome.size is not None
    student = outcome.evaluation
    return {
        "name": config.name,
        "method": config.method.kind,
        "about": getattr(resolve_method(config.method), "summary", ""),
        "seconds": seconds,
        **training_speed(read_lines(config.output_path / "metrics.jsonl")),
        "rows": {
            "train": len(inputs.train),
            "evaluation": len(inputs.evaluation) if inputs.evaluation else 0,
            "skipped": inputs.train.skipped,
        },
        "parameters": asdict(outcome.size),
        "best": outcome.best,
        "student": student.metrics if student else {},
        "student_before": read_initial_metrics(config.output_path) or {},
        "teacher": teacher.metrics if teacher else {},
        "retriever": retriever_summary(config),
        "samples": sample_answers(config, inputs, student, teacher, read_initial_answers(config.output_path)),
        "machine": {"cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()},
    }


def sample_answers(
    config: RunConfig, inputs: Inputs, student: Evaluation | None, teacher: Evaluation | None,
    before: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return the student's answers to the first rows in their order, one for each, with the teacher's.

    Args:
        before: the untrained student's answers, by the place of the row.
    """
    teacher_texts = {answer.where: answer.text for answer in reversed(teacher.answers)} if teacher else {}
    order = {example.where: index for index, example in enumerate(inputs.evaluation or ())}
    first = {answer.where: answer for answer in reversed(student.answers)} if student else {}
    answers = sorted(first.values(), key=lambda answer: order[answer.where])
    return [
        {**asdict(answer), "teacher": teacher_texts.get(answer.where), "before": (before or {}).get(answer.where)}
        for answer in answers[: config.evaluation.samples]
    ]


def training_speed(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return steps, seconds, tokens per second and shares of waiting, from rows of `metrics.jsonl`."""
    seconds = sum(row["step_seconds"] for row in rows) or 1.0
    teacher, rollouts = wait_seconds(rows)
    return {
        "steps": len(rows),
        "training_seconds": seconds,
        "tokens_per_second": sum(row["tokens"] for row in rows) / seconds,
        "teacher_wait_share": teacher / seconds,
        **({"rollout_wait_share": rollouts / seconds} if rollouts else {}),
    }


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file completely or not at all; raises the errors of `rayk.storage.atomic.write_whole`."""
    write_whole(path, json.dumps(values, indent=2, ensure_ascii=False).encode())
