"""Train the retriever of a run once, and find it in later commands."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rayk.config import RunConfig
from rayk.data.demonstrations import DemonstrationPool
from rayk.data.examples import ExampleTable
from rayk.errors import InputError
from rayk.retrieval.model_training import ComputeSettings
from rayk.retrieval.rounds import RetrieverTraining
from rayk.serving.cluster import run_on
from rayk.teachers import Teacher


def train_retriever(
    config: RunConfig, pool: DemonstrationPool, rows: ExampleTable, teacher: Teacher, stage: Callable[[str], None],
    progress: Callable[..., None],
) -> str:  # fmt: skip
    """Train the run's retriever unless that is done already, and return its folder.

    If the run has training workers, the retriever's models are trained with the resources of one of them.

    Raises:
        InputError, RunFailed, TeacherUnavailable: as `RetrieverTraining.run`.
    """
    assert config.retriever is not None
    folder, training = _folder(config), config.training
    if retriever_summary(config) is None:
        threads = training.threads or (0 if training.workers else None)
        compute = ComputeSettings(config.seed, training.precision, threads)
        remote = partial(run_on, training.resources) if training.workers else None
        RetrieverTraining(config.retriever, pool, rows, teacher, folder, compute, remote, stage, progress).run()
    return str(folder)


def find_retriever(config: RunConfig) -> str | None:
    """Return the folder of the run's trained retriever; None for a run without a retriever.

    Raises:
        InputError: the retriever is not trained yet.
    """
    if config.retriever is None:
        return None
    if retriever_summary(config) is None:
        raise InputError(f"There is no trained retriever in '{_folder(config)}'; run the config first.")
    return str(_folder(config))


def retriever_summary(config: RunConfig) -> dict[str, Any] | None:
    """Return the summary of the retriever's training; None until it is finished, and for a run without a retriever."""
    path = _folder(config) / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if config.retriever and path.exists() else None


def _folder(config: RunConfig) -> Path:
    return config.output_path / "retriever"
