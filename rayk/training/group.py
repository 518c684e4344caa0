"""Ray Train without what a run of ours has no use for: each actor is a process that takes seconds to start on a small
machine, and workers wait for them.

No group of workers gets the actor that hands out Ray Data's datasets, for rows travel in the job. On a cluster of this
process's own, which neither grows nor outlives it, two more are spared: the one that asks an autoscaler for the
workers' resources, and the one that frees them after a controller that died. There, too, the controller and its
workers have their environment variables from this process, as it was when Ray started, and not as a runtime
environment: for that Ray would start Python twice in every worker.
"""

import threading
from typing import Any

import ray
from ray.train import Result
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.config import ScalingConfig

from rayk.serving.cluster import is_own


class GroupTrainer(TorchTrainer):
    """`TorchTrainer` that starts a controller, its workers, and nothing else that can be spared."""

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        spared = (DatasetsCallback, PlacementGroupCleanerCallback) if is_own() else DatasetsCallback
        return [each for each in super()._create_default_callbacks() if not isinstance(each, spared)]

    def _initialize_and_run_controller(self, **settings: Any) -> Result:
        if not is_own():
            return super()._initialize_and_run_controller(**settings)
        settings["scaling_policy"] = _asking_no_autoscaler(self.scaling_config)
        controller = ray.remote(num_cpus=0)(TrainController).remote(**settings)
        if threading.current_thread() is threading.main_thread():
            self._register_sigint_handler(controller)
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())


def _asking_no_autoscaler(scaling: ScalingConfig) -> FixedScalingPolicy:
    """As many workers as `scaling` says."""

    class Quiet(FixedScalingPolicy):  # in here it travels by value, and the controller imports nothing of rayk
        def after_controller_start(self, train_run_context: Any) -> None:
            pass

        def _maybe_send_resource_request(self) -> None:
            pass

    return Quiet(scaling)
