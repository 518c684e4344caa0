"""Send training curves to TensorBoard, Weights & Biases and MLflow.

A resumed run continues its curves: OUTPUT/tracking.json has the run's id in each service. Steps that are computed again
after a crash have the values that were sent before, so services may keep either.
"""

import importlib.util
import json
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import yaml

from rayk.config.paths import RUN_CONFIG
from rayk.config.secrets import hide
from rayk.config.tracking import MlflowConfig, TrackingConfig, WandbConfig
from rayk.errors import InputError, RaykError
from rayk.storage.atomic import write_whole

logger = logging.getLogger(__name__)

_PARAMETERS_PER_CALL = 100
"""Largest number of parameters that MLflow takes at once."""
_STEPS_WAITING = 100
"""Largest number of steps that wait for MLflow before the run waits, too."""


class Tracker(Protocol):
    """A place that curves are sent to."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add the values of a step."""
        ...

    def close(self, completed: bool) -> None:
        """Send what is left, and whether the run has completed."""
        ...


def check_trackers(settings: TrackingConfig) -> None:
    """Check that the packages of `tracking` are installed.

    Raises:
        InputError: one is not.
    """
    for name in ("wandb", "mlflow"):
        if getattr(settings, name) is not None and importlib.util.find_spec(name) is None:
            raise InputError(f"tracking.{name} needs the package {name}: pip install 'rayk[tracking]'")


class Trackers:
    """All trackers of a run. A service that fails is named in a warning and left out; training goes on without it."""

    def __init__(self, folder: Path, step: int, settings: TrackingConfig):
        """
        Args:
            folder: the run directory, with the run's `config.yaml`.
            step: the number of steps that the run has already made.
        """
        self._board = _TensorBoard(folder, step) if settings.tensorboard else None
        self._services: dict[str, Tracker] = {}
        ids, config = _Ids(folder / "tracking.json"), _read_config(folder)
        if (wandb := settings.wandb) is not None:
            self._try("wandb", lambda: self._services.update(wandb=_Wandb(folder, wandb, ids, config)))
        if (mlflow := settings.mlflow) is not None:
            self._try("mlflow", lambda: self._services.update(mlflow=_Mlflow(mlflow, ids, config)))

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Send the numbers of a row of metrics, except for its times of day."""
        values = {
            name: value
            for name, value in row.items()
            if name != "step" and not name.endswith("_at") and isinstance(value, int | float)
        }
        if self._board is not None:
            self._board.log(values, step)
        for name, service in list(self._services.items()):
            self._try(name, partial(service.log, values, step))

    def close(self, completed: bool) -> None:
        if self._board is not None:
            self._board.close(completed)
        for name, service in list(self._services.items()):
            self._try(name, partial(service.close, completed))

    def _try(self, name: str, call: Callable[[], None]) -> None:
        """Call a service; leave it out if that fails."""
        try:
            call()
        except RaykError:
            raise  # of the run directory's disk
        except Exception as error:
            self._services.pop(name, None)
            cause = hide(f"{type(error).__name__}: {error}")
            logger.warning("tracking.%s is left out from now on: %s", name, cause)


class _TensorBoard:
    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, completed: bool) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, settings: WandbConfig, ids: "_Ids", config: dict[str, Any]):
        import wandb

        run_id = ids.get("wandb") or ids.put("wandb", secrets.token_hex(4))
        self._run = wandb.init(
            project=settings.project, entity=settings.entity, group=settings.group, tags=settings.tags,
            mode=settings.mode, dir=folder, name=config.get("name"), id=run_id, resume="allow", config=config,
            allow_val_change=True, settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self, completed: bool) -> None:
        self._run.finish(exit_code=0 if completed else 1)


class _Mlflow:
    def __init__(self, settings: MlflowConfig, ids: "_Ids", config: dict[str, Any]):
        import mlflow

        self._client = mlflow.MlflowClient(settings.tracking_uri)
        self._waiting: deque[Any] = deque()
        self._run_id = ids.get("mlflow") or self._create_run(settings, ids, config)
        self._client.update_run(self._run_id, status="RUNNING")

    def log(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = round(1000 * time.time())
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        if len(self._waiting) == _STEPS_WAITING:
            self._waiting.popleft().wait()
        self._waiting.append(self._client.log_batch(self._run_id, metrics, synchronous=False))

    def close(self, completed: bool) -> None:
        for operation in self._waiting:
            operation.wait()
        self._client.set_terminated(self._run_id, "FINISHED" if completed else "FAILED")

    def _create_run(self, settings: MlflowConfig, ids: "_Ids", config: dict[str, Any]) -> str:
        from mlflow.entities import Param

        experiment = self._client.get_experiment_by_name(settings.experiment)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(settings.experiment)
        run_id = self._client.create_run(experiment_id, run_name=config.get("name"), tags=settings.tags).info.run_id
        parameters = [Param(place, str(value)) for place, value in _places(config)]
        for start in range(0, len(parameters), _PARAMETERS_PER_CALL):
            self._client.log_batch(run_id, params=parameters[start : start + _PARAMETERS_PER_CALL])
        return ids.put("mlflow", run_id)


class _Ids:
    """The run's ids in the services, in a file of the run directory."""

    def __init__(self, path: Path):
        self._path = path

    def get(self, service: str) -> str | None:
        return self._read().get(service)

    def put(self, service: str, run_id: str) -> str:
        write_whole(self._path, json.dumps(self._read() | {service: run_id}).encode())
        return run_id

    def _read(self) -> dict[str, str]:
        return json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else {}


def _read_config(folder: Path) -> dict[str, Any]:
    """Return the run's settings, in which secrets are masked."""
    path = folder / RUN_CONFIG
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}


def _places(config: Any, place: str = "") -> list[tuple[str, Any]]:
    """Return all values of settings with their places, such as ("teachers.0.model", "Qwen/Qwen3-8B")."""
    if isinstance(config, dict | list) and config:
        items = config.items() if isinstance(config, dict) else enumerate(config)
        return [each for key, value in items for each in _places(value, f"{place}.{key}".lstrip("."))]
    return [(place, config)]
