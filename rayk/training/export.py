"""The student in a checkpoint, as a whole model in this process: no Ray, no GPU, any number of workers and shards."""

from contextlib import ExitStack
from typing import Any

from torch import nn

from rayk.config import RunConfig
from rayk.errors import InputError, RaykError
from rayk.models.student import make_model
from rayk.storage.tensor_files import DamagedFile
from rayk.training import checkpoint_v1
from rayk.training.checkpoint import CheckpointStore, Manifest
from rayk.training.learner_state import WholeTensors, load_weights, open_shards
from rayk.training.student import Student


def choose_checkpoint(store: CheckpointStore, step: int | None = None) -> Manifest:
    """Return the manifest of a checkpoint whose weights are intact.

    Args:
        step: its step; None: that of the best evaluation, with `evaluation.keep_best`, or else the newest intact one.

    Raises:
        InputError: there is no checkpoint, none of this step, or no intact one.
        OSError: the store cannot be read.
    """
    steps = store.steps()
    if not steps:
        raise InputError(f"There is no checkpoint in '{store.location}' yet.")
    listed = ", ".join(f"{each:,}" for each in steps)
    if step is not None and step not in steps:
        raise InputError(
            f"There is no checkpoint of step {step:,} in '{store.location}'; there are those of: {listed}."
        )
    for candidate in _candidates(store, steps) if step is None else [step]:
        manifest = store.manifest(candidate)
        if manifest is not None and store.has_files(manifest, _weight_files(manifest)):
            return manifest
    damaged = f"The checkpoint of step {step:,}" if step is not None else f"Each checkpoint ({listed})"
    raise InputError(
        f"{damaged} in '{store.location}' is damaged or incomplete; give another --step, or resume the run."
    )


def load_student(config: RunConfig, store: CheckpointStore, manifest: Manifest, tokenizer: Any) -> nn.Module:
    """Return the student's model with the weights of a checkpoint, on the CPU.

    Raises:
        InputError: `student.model` cannot be loaded, or the checkpoint belongs to another student.
    """
    module = nn.Module()
    module.student = Student(make_model(config.student, tokenizer, config.seed))
    with ExitStack() as stack:
        try:
            if manifest.attempt:
                source: Any = open_shards(store, manifest, stack)
            else:
                weights = checkpoint_v1.read_weights(store, manifest)
                source = WholeTensors({f"model.{name}": tensor for name, tensor in weights.items()})
            load_weights(module, source, without="method_modules")
        except (DamagedFile, RaykError) as error:
            raise InputError(
                f"The checkpoint of step {manifest.step:,} in '{store.location}' does not fit the settings of the run: "
                f"{error}; export from the directory of the run that wrote it."
            ) from error
    return module.student.model


def _candidates(store: CheckpointStore, steps: list[int]) -> list[int]:
    """Return the steps to try: first the one whose model the run would save now."""
    newest = next(store.manifests(), None)
    best = newest.best.get("step") if newest is not None else None
    return [*([best] if best in steps else []), *reversed(steps)]


def _weight_files(manifest: Manifest) -> list[str]:
    return manifest.named(".shard-") if manifest.attempt else ["model.safetensors"]
