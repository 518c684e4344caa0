"""Write the model of any checkpoint of a run, as the run itself writes `model/` at its end."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rayk.config import RunConfig, load_config
from rayk.config.paths import RUN_CONFIG, absolute_path, is_uri, place_beside
from rayk.config.secrets import hide
from rayk.data.chat_template import ChatTemplate
from rayk.errors import InputError, RunFailed
from rayk.models import load_tokenizer
from rayk.models.ends import set_end_token_ids
from rayk.models.student import saved_dtype
from rayk.run.directory import ROUNDS, check_base_weights
from rayk.run.inputs import find_tokenizer, read_tables
from rayk.run.model_copy import copy_model, has_files
from rayk.run.model_facts import ModelFacts, read_model_facts
from rayk.run.synthesis_inputs import with_synthesized_rows
from rayk.storage.places import first_line
from rayk.training.checkpoint import CheckpointStore
from rayk.training.export import choose_checkpoint, load_student
from rayk.training.student import save_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Export:
    """A written model: the folder, and the step of its checkpoint."""

    model: str
    step: int


def export_model(folder: Path, output: str | None = None, step: int | None = None) -> Export:
    """Write the model of a checkpoint of the run in `folder`, with tokenizer and generation settings; an adapter is
    merged, and also written to the sibling folder `…-adapter`. Needs no Ray, and the CPU only.

    Args:
        output: the model's folder, or a URI, for which the model is first written to a temporary folder; None:
            `export/step-N` in the run directory.
        step: the step of the checkpoint; see `choose_checkpoint`.

    Raises:
        InputError: `folder` is no run directory, there is no such checkpoint, or `output` exists.
        RunFailed: `output` cannot be written.
    """
    config = read_run_config(folder)
    try:
        store = CheckpointStore(config.checkpoints)
        manifest = choose_checkpoint(store, step)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"The checkpoints of the run in '{folder}' cannot be read: {first_line(error)}.") from error
    target = output or str(config.output_path / "export" / f"step-{manifest.step:08d}")
    target = target if is_uri(target) else absolute_path(target)
    if os.path.isfile(target) or has_files(target, "--output"):
        raise InputError(f"The output '{hide(target)}' exists already; give another --output, or remove it.")
    check_base_weights(config)
    facts = read_model_facts(config.output_path) or _facts_of_rows(config)
    tokenizer = load_tokenizer(facts.tokenizer, trust_remote_code=config.student.trust_remote_code)
    tokenizer.chat_template = facts.chat_template or tokenizer.chat_template
    model = load_student(config, store, manifest, tokenizer)
    set_end_token_ids(model, tokenizer, facts.ends)
    dtype = saved_dtype(config.student)
    if not is_uri(target):
        save_model(model, tokenizer, Path(target), dtype, adapter=Path(place_beside(target, "-adapter")))
        return Export(target, manifest.step)
    with TemporaryDirectory() as scratch:
        written, adapter = Path(scratch, "model"), Path(scratch, "adapter")
        save_model(model, tokenizer, written, dtype, adapter=adapter)
        try:
            copy_model(written, adapter, target)
        except (OSError, ValueError) as error:
            raise RunFailed(f"The model cannot be written to '{hide(target)}': {first_line(error)}.") from error
    return Export(hide(target), manifest.step)


def read_run_config(folder: Path) -> RunConfig:
    """Return the settings of the run in `folder`, which may have been moved.

    Raises:
        InputError: it is no run directory, or the directory of several rounds.
    """
    file = folder / RUN_CONFIG
    if not file.is_file():
        reason = f"has no {RUN_CONFIG}" if folder.is_dir() else "does not exist"
        raise InputError(f"'{folder}' is no run directory of rayk: it {reason}; give the output folder of a run.")
    config = load_config(file, output=str(folder.absolute()))
    rounds = sorted(path.parent for path in (folder / ROUNDS).glob(f"*/{RUN_CONFIG}"))
    if config.rounds > 1:
        names = ", ".join(map(str, rounds)) or "none has started yet"
        raise InputError(f"'{folder}' is a run with rounds, which have checkpoints of their own; give one: {names}.")
    return config


def _facts_of_rows(config: RunConfig) -> ModelFacts:
    """Return the facts of a run that has not stored them, from its settings and training rows."""
    attached = [t.name for t in config.signal_teachers if t.attach and t.model is None]
    if config.student.tokenizer is None and config.student.model is None and attached:
        raise InputError(
            f"The tokenizer of the run is that of teacher '{attached[0]}', whose model is not known; set "
            f"student.tokenizer in '{config.output_path / RUN_CONFIG}'."
        )
    name = find_tokenizer(config, {})
    tokenizer = load_tokenizer(name, trust_remote_code=config.student.trust_remote_code)
    ends: set[int] = set()
    try:
        if config.synthesis is not None:
            config = with_synthesized_rows(config)
        train, _, pretraining = read_tables(config, tokenizer, evaluation=False)
        ends = {token for table in (train, pretraining) if table is not None for token in table.ends}
    except InputError as error:
        logger.warning(
            "generation_config.json may lack tokens that end the completions, because the training rows cannot be "
            "read: %s", error,
        )  # fmt: skip
    template = ChatTemplate.from_settings(config.data, tokenizer).template
    return ModelFacts(tokenizer=name, ends=tuple(sorted(ends)), chat_template=template)
