"""`rayk quickstart`: a complete distillation on a small scale, on this machine alone.

A teacher is trained on the built-in task (once; it is cached) and deployed on Ray Serve with two replicas. Two students
with the same initial weights learn the task from the same rows in the same number of steps: one from the rows alone
(supervised), one from the teacher's distributions on them (logit KD).
"""

import hashlib
import inspect
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayk.config import Replicas, Resources, RunConfig, TeacherConfig, parse_config
from rayk.config.paths import RUN_CONFIG, cache_folder
from rayk.data import quickstart_task
from rayk.errors import InputError
from rayk.report.report import write_report
from rayk.run import ProgressListener, distill
from rayk.serving.cluster import start_ray
from rayk.teachers import serve_teacher

METHODS: dict[str, dict[str, Any]] = {
    "supervised": {"kind": "supervised"},
    "logit_kd": {"kind": "logit_kd", "support": {"kind": "topk", "k": 16}},
}
_EVALUATION_ROWS = 250
_TEACHER = "quickstart-teacher"


@dataclass(frozen=True)
class QuickstartResult:
    """The summaries of both runs, and the report that compares them."""

    summaries: list[dict[str, Any]]
    report: Path


def run_quickstart(
    output: Path, listener: ProgressListener, seed: int = 0, steps: int | None = None
) -> QuickstartResult:
    """Train the teacher unless it is cached, train both students, and compare them in OUTPUT/report.html.

    Args:
        seed: seed of the students' weights, rows and order.
        steps: number of steps per student; by default the task's.
    """
    for method in METHODS:
        clear_run(output / method)
    home = task_folder()
    model = teacher_model(home, listener)
    start_ray(num_cpus=4)
    listener.stage("Starting the teacher on Ray Serve, 2 replicas")
    with serve_teacher(teacher_config(model)):
        results = [
            distill(student_config(home, output, method, seed, steps), listener=_PrefixedListener(listener, method))
            for method in METHODS
        ]
    report = output / "report.html"
    write_report([result.output for result in results], report)
    return QuickstartResult([result.summary for result in results], report)


def task_folder() -> Path:
    """Return the folder of the teacher and the rows of the built-in task."""
    return reused_folder(inspect.getsource(quickstart_task))


def reused_folder(version: str) -> Path:
    """Return the folder for what quickstarts reuse; each version of a task, a text that differs, has its own."""
    return cache_folder() / f"quickstart-{hashlib.sha256(version.encode()).hexdigest()[:12]}"


def teacher_model(home: Path, listener: ProgressListener) -> Path:
    """Return the folder of the trained teacher; train it first unless `home` contains it."""
    model = home / "teacher"
    if model.is_dir():
        listener.stage(f"The teacher is cached in {home}")
        return model
    listener.stage("Training the teacher on the built-in task (only the first time)")
    work = home / f"training-{os.getpid()}"
    try:
        work.mkdir(parents=True)
        quickstart_task.task_tokenizer().save_pretrained(work / "tokenizer")
        settings = quickstart_task.TEACHER_TRAINING
        quickstart_task.write_rows(work / "train.jsonl", settings["rows"], seed=1)
        config = parse_config(
            {
                "name": "teacher",
                "output": str(work / "run"),
                "student": {
                    "config": _architecture(quickstart_task.TEACHER_MODEL),
                    "tokenizer": str(work / "tokenizer"),
                },
                "data": {"train": {"path": str(work / "train.jsonl")}},
                "method": {"kind": "supervised"},
                "training": {"workers": 0, **_training(settings)},
                "tracking": {"tensorboard": False},
            }
        )
        result = distill(config, listener=listener)
        result.model.replace(model)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return model


def teacher_config(model: Path, replicas: int = 2) -> TeacherConfig:
    """Return the settings of the served teacher."""
    count = Replicas(min=replicas, max=replicas)
    return TeacherConfig(name=_TEACHER, model=str(model), replicas=count, resources=Resources(num_cpus=0.5))


def student_config(
    home: Path, output: Path, method: str, seed: int = 0, steps: int | None = None, workers: int = 2
) -> RunConfig:
    """Return the config of one student's run; the runs differ only in `name`, `output` and `method`."""
    settings = quickstart_task.STUDENT_TRAINING
    data = home / f"rows-{seed}"
    if not data.is_dir():
        part = home / f"rows-{seed}-{os.getpid()}"  # not `replace_folder`: processes share this folder
        part.mkdir(parents=True, exist_ok=True)
        quickstart_task.write_rows(part / "train.jsonl", settings["rows"], seed=100 + seed)
        quickstart_task.write_rows(part / "evaluation.jsonl", _EVALUATION_ROWS, seed=0, split="evaluation")
        part.replace(data)
    training = _training(settings) | ({"steps": steps} if steps else {})
    return parse_config(
        {
            "name": method,
            "output": str(output / method),
            "seed": seed,
            "teachers": [{"name": _TEACHER, "attach": True}],
            "student": {"config": _architecture(quickstart_task.STUDENT_MODEL)},
            "data": {
                "train": {"path": str(data / "train.jsonl")},
                "evaluation": {"path": str(data / "evaluation.jsonl")},
            },
            "method": METHODS[method],
            "training": {"workers": workers, "resources": {"num_cpus": 0.5}, **training},
            "evaluation": {"every_steps": 100, "generation": {"max_new_tokens": 8}, "answer_field": "answer"},
        }
    )


def _architecture(settings: dict[str, Any]) -> dict[str, Any]:
    return {"model_type": "llama", **settings}


def _training(settings: dict[str, Any]) -> dict[str, Any]:
    names = {"max_gradient_norm": "max_grad_norm"}
    values = {names.get(name, name): value for name, value in settings.items() if name != "rows"}
    return values | {"micro_batch_tokens": 4096, "checkpoint_every_steps": 250}


def clear_run(folder: Path) -> None:
    """Remove the run directory of an earlier quickstart.

    Raises:
        InputError: `folder` contains something else.
    """
    if not folder.exists():
        return
    if not (folder / RUN_CONFIG).is_file():
        raise InputError(
            f"'{folder}' exists and is no run of an earlier quickstart; remove it or give another --output."
        )
    shutil.rmtree(folder)


class _PrefixedListener(ProgressListener):
    """A progress listener that adds the method's name to each stage."""

    def __init__(self, listener: ProgressListener, method: str):
        self._listener, self._method = listener, method

    def stage(self, text: str) -> None:
        self._listener.stage(f"[{self._method}] {text}")

    def steps(self, rows: Sequence[Mapping[str, Any]], total: int) -> None:
        self._listener.steps(rows, total)

    def progress(self, done: int, total: int, text: str, unit: str = "row") -> None:
        self._listener.progress(done, total, text, unit)
