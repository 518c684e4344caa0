"""Copy a run's model to the place that `student.save_to` names."""

from pathlib import Path

from rayk.config import RunConfig
from rayk.config.paths import place_beside
from rayk.config.secrets import hide
from rayk.errors import InputError, RunFailed
from rayk.storage.places import copy_folder, file_names, first_line, open_place

CONFIG = "config.json"
"""The file without which transformers loads no model."""


def copy_model(model: Path, adapter: Path, place: str) -> None:
    """Copy the folder of a model to a folder or URI, and that of its adapter, if it exists, beside it (`…-adapter`).

    Raises:
        ValueError, OSError: the place cannot be written.
    """
    if adapter.is_dir():
        copy_folder(adapter, place_beside(place, "-adapter"), "adapter_config.json")
    copy_folder(model, place, CONFIG)


def save_copy(config: RunConfig) -> None:
    """Copy OUTPUT/model to `student.save_to`, if that is set.

    Raises:
        RunFailed: the place cannot be written.
    """
    place, output = config.student.save_to, config.output_path
    if place is None:
        return
    try:
        copy_model(output / "model", output / "adapter", place)
    except (ValueError, OSError) as error:
        raise RunFailed(
            f"The model in '{output / 'model'}' is complete, but cannot be copied to student.save_to '{hide(place)}': "
            f"{first_line(error)}; correct the setting and run again with --resume."
        ) from error


def check_copy(config: RunConfig) -> None:
    """Check that `student.save_to` contains no other model.

    Raises:
        InputError: it does, or cannot be read.
    """
    if (place := config.student.save_to) is not None and has_files(place, "student.save_to"):
        raise InputError(f"student.save_to '{hide(place)}' contains files already; give another place, or empty it.")


def has_files(place: str, setting: str) -> bool:
    """Return whether there are files in a folder or at a URI.

    Raises:
        InputError: it cannot be read; the message names the setting.
    """
    try:
        return bool(file_names(*open_place(place)))
    except (ValueError, OSError) as error:
        raise InputError(f"{setting} '{hide(place)}' cannot be read: {first_line(error)}.") from error
