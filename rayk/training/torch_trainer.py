"""A `TorchTrainer` that starts fewer actors: each is a process that takes seconds to start on a small machine, while
workers wait.

rayk sends rows in the `Job`, so the actor that distributes Ray Data's datasets is never needed. If this process has
started the Ray cluster, the cluster neither grows nor outlives the process, so two more actors are left out: the one
that requests resources from an autoscaler, and the one that frees them if the controller dies. The controller and its
workers then also get the environment variables that this process had when it started Ray. They use no runtime
environment, because for that Ray would start Python twice in every worker.

All of this uses private parts of Ray Train. If a version of Ray lacks one of them, `trainer_class` returns Ray's own
`TorchTrainer`, which only starts more slowly.
"""

import contextlib
import inspect
import os
from typing import Any

import ray
from ray.train import Result
from ray.train.torch import TorchTrainer

from rayk.serving.cluster import is_own_cluster

try:
    from ray.train.v2._internal.callbacks import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2._internal.execution.controller import TrainController
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
except ImportError:
    _has_private_parts = False
else:
    _has_private_parts = all(
        inspect.isfunction(getattr(owner, name, None))
        for owner, name in [
            (TorchTrainer, "_create_default_callbacks"),
            (TorchTrainer, "_initialize_and_run_controller"),
            (FixedScalingPolicy, "after_controller_start"),
            (FixedScalingPolicy, "_maybe_send_resource_request"),
        ]
    )

_ABORT_SECONDS = 10.0

PLAIN_TRAINER_VARIABLE = "RAYK_PLAIN_TORCH_TRAINER"
"""Environment variable that selects Ray's own `TorchTrainer`."""


def trainer_class() -> type[TorchTrainer]:
    """Return `FastStartTrainer`, or `TorchTrainer` if the variable selects it or Ray lacks a private part."""
    wants_plain = os.environ.get(PLAIN_TRAINER_VARIABLE, "") not in ("", "0")
    return FastStartTrainer if _has_private_parts and not wants_plain else TorchTrainer


def abort(trainer: TorchTrainer) -> None:
    """Stop the workers of a running `FastStartTrainer` at once; a `TorchTrainer` stops after its current step."""
    controller = getattr(trainer, "controller", None)
    if controller is not None:
        with contextlib.suppress(ray.exceptions.RayError):  # the controller or Ray has ended already
            ray.get(controller.abort.remote(), timeout=_ABORT_SECONDS)


class FastStartTrainer(TorchTrainer):
    """`TorchTrainer` that starts a controller, its workers, and as few other actors as possible."""

    controller: Any = None
    """The controller's actor while training runs on this process's own cluster."""

    def _create_default_callbacks(self) -> list[Any]:
        left_out = (DatasetsCallback, PlacementGroupCleanerCallback) if is_own_cluster() else DatasetsCallback
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, left_out)]

    def _initialize_and_run_controller(self, **settings: Any) -> Result:
        if not is_own_cluster() or self.scaling_config.elasticity_enabled:
            return super()._initialize_and_run_controller(**settings)
        settings["scaling_policy"] = _fixed_scaling(self.scaling_config)
        self.controller = ray.remote(num_cpus=0)(TrainController).remote(**settings)
        ray.get(self.controller.run.remote())
        return ray.get(self.controller.get_result.remote())


def _fixed_scaling(scaling: Any) -> Any:
    """Return a policy with the workers of `scaling` that sends no requests to an autoscaler."""

    class FixedWorkers(FixedScalingPolicy):  # defined here it is pickled by value, so the controller imports no rayk
        def after_controller_start(self, train_run_context: Any) -> None:
            pass

        def _maybe_send_resource_request(self) -> None:
            pass

    return FixedWorkers(scaling)
