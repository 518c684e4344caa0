"""Starting the worker group: Ray Train for one or more workers, its local mode for none."""

import contextlib
import logging
import signal
import uuid
from collections.abc import Iterator
from dataclasses import replace

import ray
from ray import cloudpickle
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from rayk.errors import RunFailed
from rayk.evaluation.evaluate import Evaluation
from rayk.serving.cluster import gpus_per_worker, run_on
from rayk.training.group import GroupTrainer
from rayk.training.job import Job, Outcome
from rayk.training.loop import evaluate_worker, train_worker


def train(job: Job) -> Outcome:
    """Train `job` from its latest checkpoint, restarting the worker group when a worker dies.

    Raises:
        RaykError: what stopped the run, as the workers agreed on it.
        RunFailed: workers died more often than `training.max_failures` allows.
        KeyboardInterrupt: Ctrl-C; the latest checkpoint stands.
    """
    settings = job.config.training
    if settings.workers == 0:
        logging.getLogger("ray.train").setLevel(logging.WARNING)  # it would announce its local mode
        trainer = TorchTrainer(lambda: train_worker(job), scaling_config=ScalingConfig(num_workers=0))
        return _checked(trainer.fit().return_value)
    shared = replace(
        job, train_table=ray.put(job.train_table), evaluation_table=_put(job.evaluation_table),
        pretraining_table=_put(job.pretraining_table), views=_put(job.views),
    )  # fmt: skip
    gpus = gpus_per_worker(settings.resources.num_gpus)
    trainer = GroupTrainer(
        # Job and outcome pass the controller packed, so that it can do without all that workers import.
        lambda given: cloudpickle.dumps(train_worker(ray.get(given["job"]))),
        train_loop_config={"job": ray.put(shared)},
        scaling_config=ScalingConfig(
            num_workers=settings.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": settings.resources.num_cpus, "GPU": gpus, **settings.resources.custom},
        ),
        torch_config=TorchConfig(timeout_s=int(settings.collective_timeout_seconds)),
        run_config=RunConfig(
            # Each attempt under a name of its own: checkpoints are ours (rayk.training.checkpoint), and Ray's record of
            # an earlier attempt must not be taken up.
            name=f"attempt-{uuid.uuid4().hex[:8]}",
            storage_path=str(job.config.output_path / "ray_train"),
            failure_config=FailureConfig(max_failures=settings.max_failures),
        ),
    )
    with _interruptible():
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise RunFailed(f"Training failed: {_cause(error)}") from error
    return _checked(cloudpickle.loads(result.return_value))


def evaluate_remotely(job: Job) -> Evaluation:
    """Measure the student of `job` on its evaluation rows, on one worker's resources."""
    return run_on(job.config.training.resources, evaluate_worker, job)


def _checked(outcome: Outcome) -> Outcome:
    if outcome.problem is not None:
        raise outcome.problem
    return outcome


def _put(shared):
    return None if shared is None else ray.put(shared)


def _cause(error: ray.train.TrainingFailedError) -> str:
    """The sentence in Ray Train's report, which is mostly tracebacks."""
    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    lines = [line for line in str(failures[0]).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(failures[0]).__name__


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ray Train's own SIGINT handler aborts its controller and then exits the process with 0; to our caller that is
    Ctrl-C like any other. The handler in place before comes back afterwards."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        with contextlib.suppress(ValueError):  # not on the main thread, where no handler was set either
            signal.signal(signal.SIGINT, before)
