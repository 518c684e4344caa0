"""`rayk evaluate`: measure a trained student, or any model, on a config's evaluation rows."""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayk.config import RunConfig
from rayk.errors import InputError, RaykError
from rayk.run import ProgressListener, evaluate_model, with_absolute_paths
from rayk.run.summary import write_json

logger = logging.getLogger(__name__)


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuse `--set student.model=…`, which would not change the model that is measured.

    Raises:
        InputError: `student.model` is among the overrides.
    """
    for override in overrides:
        key, _, value = override.partition("=")
        if key.strip() == "student.model":
            raise InputError(
                f"--set {override} does not choose the model to measure: by default that is the run's trained student. "
                f"Give --model {value.strip()} instead."
            )


def evaluate(config: RunConfig, model: str | None, listener: ProgressListener) -> tuple[dict[str, Any], Path | None]:
    """Measure `model`, by default the run's student, and write the result to `evaluation.json`.

    The file is in the run directory, or in the folder of `model` if that is a local one.

    Returns:
        The summary, and the file to which it was written; None if it was not written, because `model` is no local
        folder or the folder cannot be written.
    """
    summary = evaluate_model(config, model, listener)
    folder = with_absolute_paths(config).output_path if model is None else Path(os.path.expanduser(model))
    if not folder.is_dir():
        return summary, None
    path = folder / "evaluation.json"
    try:
        write_json(path, summary)
    except RaykError as error:
        logger.warning("%s", error)
        return summary, None
    return summary, path


def to_json(summary: dict[str, Any]) -> str:
    """Return the summary as JSON text."""
    return json.dumps(summary, indent=2, ensure_ascii=False)
