"""The trainer with fewer actors gives the same run as Ray's own, which replaces it if Ray lacks a private part."""

import subprocess
import sys

import pytest
from ray.train.torch import TorchTrainer

from rayk.run import distill
from rayk.training.torch_trainer import PLAIN_TRAINER_VARIABLE, FastStartTrainer, trainer_class
from tests.runs import assert_same_learning, config

PRIVATE_MODULES = ("callbacks.placement_group_callback", "execution.controller", "execution.scaling_policy")


@pytest.mark.long
def test_both_trainers_give_the_same_run(tmp_path, tiny_student, ray_cluster, monkeypatch):
    for name, plain in (("fast", ""), ("plain", "1")):
        monkeypatch.setenv(PLAIN_TRAINER_VARIABLE, plain)
        assert trainer_class() is (TorchTrainer if plain else FastStartTrainer)
        (tmp_path / name).mkdir()
        distill(config(tmp_path / name, tiny_student, workers=2, steps=4))
    assert_same_learning(tmp_path / "fast" / "run", tmp_path / "plain" / "run", 1e-6)


@pytest.mark.parametrize("lost", [
    *(f"sys.modules['ray.train.v2._internal.{name}'] = None" for name in PRIVATE_MODULES),
    "import ray.train.v2._internal.callbacks as module; del module.DatasetsCallback",
    "from ray.train.torch import TorchTrainer; del TorchTrainer.__mro__[1]._initialize_and_run_controller",
    "from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy; "
    "del FixedScalingPolicy.__mro__[1]._maybe_send_resource_request",
])  # fmt: skip
def test_missing_private_parts_select_the_plain_trainer(lost):
    """The part is removed before rayk is imported; TorchTrainer itself imports some of the modules first."""
    program = (
        f"import sys\nfrom ray.train.torch import TorchTrainer\n{lost}\n"
        "from rayk.training.torch_trainer import trainer_class\nassert trainer_class() is TorchTrainer"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
