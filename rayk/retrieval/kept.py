"""The retriever of a run: trained once, and found again."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rayk.config import RunConfig
from rayk.data.demonstrations import DemonstrationPool
from rayk.data.examples import ExampleTable
from rayk.errors import InputError
from rayk.retrieval.fitting import Workshop
from rayk.retrieval.learning import Learning
from rayk.serving.cluster import run_on
from rayk.teachers import Teacher


def learned_retriever(
    config: RunConfig, pool: DemonstrationPool, rows: ExampleTable, teacher: Teacher,
    stage: Callable[[str], None], progress: Callable[..., None],
) -> str:  # fmt: skip
    """The folder of the run's retriever, trained now unless it is there: where `training` has its workers, one of them.

    Raises:
        As `Learning.to_the_end`.
    """
    assert config.retriever is not None
    folder, training = _folder(config), config.training
    if retriever_summary(config) is None:
        threads = training.threads or (0 if training.workers else None)
        Learning(
            config.retriever, pool, rows, teacher, folder, Workshop(config.seed, training.precision, threads),
            partial(run_on, training.resources) if training.workers else None, stage, progress,
        ).to_the_end()  # fmt: skip
    return str(folder)


def found_retriever(config: RunConfig) -> str | None:
    """The folder of the retriever that the run has trained; None where it is to have none.

    Raises:
        InputError: it has not.
    """
    if config.retriever is None:
        return None
    if retriever_summary(config) is None:
        raise InputError(f"There is no trained retriever in '{_folder(config)}'; run the config first.")
    return str(_folder(config))


def retriever_summary(config: RunConfig) -> dict[str, Any] | None:
    """What the training of the run's retriever came to; None until it is over."""
    path = _folder(config) / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if config.retriever and path.exists() else None


def _folder(config: RunConfig) -> Path:
    return config.output_path / "retriever"
