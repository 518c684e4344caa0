"""Start the worker group: Ray Train with one or more workers, its local mode without any."""

import functools
import logging
import threading
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
from ray import cloudpickle
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from rayk.errors import Interrupted, RunFailed
from rayk.evaluation.evaluate import Evaluation
from rayk.serving.cluster import gpus_per_worker, run_on
from rayk.storage.places import first_line
from rayk.training.checkpoint import CheckpointStore
from rayk.training.interruption import StopRequest, stop_gracefully
from rayk.training.job import Job, Outcome
from rayk.training.torch_trainer import abort, trainer_class
from rayk.training.worker import evaluate_worker, train_worker

logger = logging.getLogger(__name__)

_RESIZE_SECONDS = 60.0
"""Interval at which Ray Train compares the number of workers with the room in the cluster."""


def train(job: Job) -> Outcome:
    """Train `job` from its latest checkpoint, restarting the worker group when a worker dies.

    Raises:
        RaykError: the problem that stopped the run on all workers.
        RunFailed: workers died more often than `training.max_failures` allows, without a new checkpoint, or a part of
            Ray died.
        KeyboardInterrupt: Ctrl-C or SIGTERM. The first one ends the current step and saves a checkpoint, a second one
            stops at once.
    """
    request = StopRequest(job.config.output_path)
    if job.config.training.workers == 0:
        logging.getLogger("ray.train").setLevel(logging.WARNING)  # no message about its local mode
        trainer = TorchTrainer(lambda: train_worker(job), scaling_config=ScalingConfig(num_workers=0))
        with stop_gracefully(request):
            return _raise_problem(trainer.fit().return_value)
    shared, store = _shared(job), CheckpointStore(job.config.checkpoints)
    while True:
        before = store.steps()[-1:]
        trainer = _make_trainer(shared)
        with stop_gracefully(request, abort=functools.partial(abort, trainer)):
            try:
                # Ray Train's own SIGINT handler, which it sets in the main thread only, would abort at once.
                result = _run_in_thread(trainer.fit)
                return _raise_problem(cloudpickle.loads(result.return_value))
            except ray.train.TrainingFailedError as error:
                newest = store.steps()[-1:]
                if newest <= before or not job.config.training.max_failures:
                    raise RunFailed(f"Training failed: {_cause(error)}") from error
                logger.warning(
                    "Workers failed (%s), but the run has advanced: it continues from step %d.", _cause(error), *newest
                )
            except ray.exceptions.RayError as error:  # Ray Train's controller, or the cluster, has died
                raise RunFailed(f"Training failed, because a part of Ray has died: {first_line(error)}.") from error


def evaluate_remotely(job: Job) -> Evaluation:
    """Evaluate the student of `job` on its evaluation rows, with the resources of one worker."""
    return run_on(job.config.training.resources, evaluate_worker, job)


def _shared(job: Job) -> Job:
    """Return the job with its tables in Ray's object store."""
    return replace(
        job, train_table=ray.put(job.train_table), evaluation_table=_put(job.evaluation_table),
        auxiliary_table=_put(job.auxiliary_table), views=_put(job.views),
    )  # fmt: skip


def _make_trainer(job: Job) -> TorchTrainer:
    settings = job.config.training
    workers = settings.workers
    gpus = gpus_per_worker(settings.resources.num_gpus)
    return trainer_class()(
        # Job and outcome are pickled, so that the controller need not import what workers import.
        lambda given: cloudpickle.dumps(train_worker(ray.get(given["job"]))),
        train_loop_config={"job": ray.put(job)},
        scaling_config=ScalingConfig(
            num_workers=workers if isinstance(workers, int) else (workers.min, workers.max),
            elastic_resize_monitor_interval_s=_RESIZE_SECONDS,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": settings.resources.num_cpus, "GPU": gpus, **settings.resources.custom},
            label_selector=settings.resources.labels or None,
        ),
        torch_config=TorchConfig(timeout_s=int(settings.collective_timeout_seconds)),
        run_config=RunConfig(
            # A new name for each attempt: rayk saves checkpoints itself (rayk.training.checkpoint), and Ray must not
            # restore its own record of an earlier attempt.
            name=f"attempt-{uuid.uuid4().hex[:8]}",
            storage_path=str(job.config.output_path / "ray_train"),
            failure_config=FailureConfig(max_failures=settings.max_failures),
        ),
    )


def _run_in_thread(work: Callable[[], Any]) -> Any:
    """Return the result of `work`, run in a thread, while this thread handles signals."""
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="rayk-train", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if errors:
        raise errors[0]
    return results[0]


def _raise_problem(outcome: Outcome) -> Outcome:
    """Raise the problem of the outcome, or return the outcome if there is none."""
    if isinstance(outcome.problem, Interrupted):
        raise KeyboardInterrupt
    if outcome.problem is not None:
        raise outcome.problem
    return outcome


def _put(shared: Any) -> Any:
    """Put a value into Ray's object store, except None."""
    return None if shared is None else ray.put(shared)


def _cause(error: ray.train.TrainingFailedError) -> str:
    """Return the last line of Ray Train's error message, whose other lines are mostly tracebacks."""
    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    lines = [line for line in str(failures[0]).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(failures[0]).__name__
