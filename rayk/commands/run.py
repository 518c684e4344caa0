"""`rayk run`: run a config from data to trained student, and report what an interrupted run has kept."""

from rayk.config import RunConfig
from rayk.errors import Interrupted, Overtaken, PolicyUnavailable, RunFailed, TeacherUnavailable
from rayk.run import ProgressListener, Result, distill, next_round, with_absolute_paths
from rayk.run.directory import has_training_rows
from rayk.training.checkpoint import CheckpointStore


def run(config: RunConfig, *, resume: bool, listener: ProgressListener) -> Result:
    """Run `config` to the end.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the message says what is kept.
        RunFailed, TeacherUnavailable, PolicyUnavailable: as in `distill`, with what is kept.
    """
    try:
        return distill(config, resume=resume, listener=listener)
    except (KeyboardInterrupt, SystemExit) as stop:
        raise Interrupted(f"Interrupted{_what_is_kept(config)}") from stop
    except Overtaken:
        raise
    except (RunFailed, TeacherUnavailable, PolicyUnavailable) as error:
        raise type(error)(f"{str(error).rstrip('.')}. Stopped{_what_is_kept(config)}") from error


def _what_is_kept(config: RunConfig) -> str:
    """Return the end of a sentence on an interrupted run: what is kept, and how to continue it."""
    config, _ = next_round(with_absolute_paths(config))
    if steps := _checkpointed_steps(config):
        return f"; the run is checkpointed at step {steps[-1]:,}. Continue it with --resume."
    if has_training_rows(config):
        return " before the first checkpoint; with --resume the training starts again at step 1."
    if (config.output_path / "synthesis").is_dir():
        return "; the generated completions are kept. Continue with --resume."
    return " before training started; nothing is lost."


def _checkpointed_steps(config: RunConfig) -> list[int]:
    try:
        return CheckpointStore(config.checkpoints).steps()
    except (OSError, ValueError):
        return []
