"""Refuse to resume a run directory whose settings or training rows have changed."""

import contextlib
import datetime
from collections.abc import Iterator
from pathlib import Path

from rayk.config import RunConfig, difference, load_config
from rayk.config.base import Placement, Selection
from rayk.config.marks import marked_fields
from rayk.config.paths import RUN_CONFIG
from rayk.config.secrets import hide, redact
from rayk.errors import InputError
from rayk.models.student import base_fingerprint
from rayk.run.model_copy import check_copy
from rayk.storage.atomic import write_whole
from rayk.storage.lease import FOLDER as LEASE
from rayk.storage.places import first_line
from rayk.training.checkpoint import CheckpointStore

PLACEMENT = set(marked_fields(RunConfig, Placement))
"""Settings that decide where and how fast a run computes but not its result; they may change when it is resumed."""
SELECTION = set(marked_fields(RunConfig, Selection)) | {"rows", "compared", "judges"}
"""Settings, and other facts about a synthesis, that decide which completions become rows but change no completion."""
ROUNDS = "rounds"
"""The folder with the rounds' own run directories."""
_DURATION = ("training.steps", "training.epochs")
"""Settings on which the learning rate of every step depends."""
_ROWS = "data.fingerprint"
_PACKAGE = "_ray_pkg_"
"""Start of the name of a folder to which Ray unpacks a job's working directory."""


def with_pinned_date(config: RunConfig) -> RunConfig:
    """Return `config` with the date that chat templates with today's date print: the one with which the run in its
    directory was started, or today for a new run. Without it tomorrow's rows would differ from today's.

    Raises:
        InputError: the directory's `config.yaml` cannot be read.
    """
    if config.data.chat_template_date is not None:
        return config
    file = config.output_path / RUN_CONFIG
    date = load_config(file).data.chat_template_date if file.exists() else datetime.date.today()
    return config.model_copy(update={"data": config.data.model_copy(update={"chat_template_date": date})})


def claim_directory(config: RunConfig, resume: bool) -> bool:
    """Create the run directory and write `config.yaml` into it; or, with `resume`, check that it belongs to this run.

    Returns:
        Whether the directory contained this run already.

    Raises:
        InputError: the directory belongs to another run, contains other files, or cannot be written.
    """
    check_directory(config, resume)
    is_resumed = (config.output_path / RUN_CONFIG).exists()
    write_config(config)
    return is_resumed


def check_directory(config: RunConfig, resume: bool) -> None:
    """Do the checks of `claim_directory` without writing."""
    folder, file = config.output_path, config.output_path / RUN_CONFIG
    if any(part.startswith(_PACKAGE) for part in folder.parts):
        raise InputError(
            f"The output '{folder}' is in Ray's temporary copy of the job's working directory, which is deleted with "
            "the job; set output to a path that all nodes share."
        )
    has_rounds, started_by = (folder / ROUNDS).exists(), {LEASE, ROUNDS if config.rounds > 1 else "synthesis"}
    if (has_rounds or has_training_rows(config)) and has_rounds != (config.rounds > 1):
        raise InputError(
            f"The run in '{folder}' was started {'with' if has_rounds else 'without'} 'rounds'; resume it the same "
            "way, or give another --output."
        )
    if file.exists():
        if not resume:
            raise InputError(
                f"The output directory '{folder}' already contains a run, which was started before; continue it with "
                "--resume, give another --output, or delete the directory."
            )
        before, now = (redact(settings.model_dump(mode="json")) for settings in (load_config(file), config))
        # Without training rows nothing has been trained yet, and the store of completions checks its own settings.
        if has_training_rows(config) and (place := difference(before, now, PLACEMENT)):
            raise InputError(
                f"The run in '{folder}' was started with another '{place}'; resume it with the same settings, or "
                f"give another --output.{_how_to_extend(folder) if place in _DURATION else ''}"
            )
    elif folder.exists() and (not folder.is_dir() or any(path.name not in started_by for path in folder.iterdir())):
        raise InputError(f"The output '{folder}' exists and is not a run directory of rayk; give another --output.")
    elif config.training.checkpoints and not resume and checkpointed_steps(config.training.checkpoints):
        raise InputError(
            f"training.checkpoints '{hide(config.training.checkpoints)}' contains checkpoints of a run; continue it "
            "with --resume, or give another place."
        )
    if not file.exists() and not resume:
        check_copy(config)


def _how_to_extend(folder: Path) -> str:
    return (
        f" A schedule cannot be made longer afterwards; to train further, start a run with student.model "
        f"'{folder / 'model'}' and another --output."
    )


def write_config(config: RunConfig) -> None:
    """Write `config.yaml` into the run directory.

    Raises:
        InputError: the directory cannot be written.
    """
    _write(config.output_path / RUN_CONFIG, config.to_yaml())


def claim_training_rows(config: RunConfig, fingerprint: str) -> None:
    """Store the fingerprint of the training rows; or check that a resumed run has the rows it was started with.

    Raises:
        InputError: the file of the rows has changed.
    """
    folder = config.output_path
    if has_training_rows(config) and (folder / _ROWS).read_text(encoding="utf-8") != fingerprint:
        assert config.data.train is not None
        raise InputError(
            f"The rows of data.train '{config.data.train.path}' are not those that the run in '{folder}' was started "
            "with; restore them, or give another --output."
        )
    _write(folder / _ROWS, fingerprint)


def check_base_weights(config: RunConfig) -> str:
    """Return the fingerprint of the weights below the student's adapter, which checkpoints do not contain; "" without
    an adapter.

    Raises:
        InputError: the run's checkpoints were written for other weights under the same name.
    """
    base = base_fingerprint(config.student)
    with _reading_checkpoints(config.checkpoints):
        before = CheckpointStore(config.checkpoints).base() if base else ""
    if before not in ("", base):
        raise InputError(
            f"The weights of student.model '{config.student.model}' are not those that the run in "
            f"'{config.output_path}' was started with, and its checkpoints contain only the adapter; restore them, or "
            "give another --output."
        )
    return base


def has_training_rows(config: RunConfig) -> bool:
    """Return whether the run in its directory has started to train on rows."""
    return (config.output_path / _ROWS).exists()


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The output directory '{path.parent}' cannot be written: {error.strerror}.") from error
    write_whole(path, text.encode())


def checkpointed_steps(place: str) -> list[int]:
    """Return the steps of the checkpoints in a folder or at a URI, in ascending order.

    Raises:
        InputError: it cannot be read.
    """
    with _reading_checkpoints(place):
        return CheckpointStore(place).steps()


@contextlib.contextmanager
def _reading_checkpoints(place: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise InputError(f"training.checkpoints '{hide(place)}' cannot be read: {first_line(error)}.") from error
