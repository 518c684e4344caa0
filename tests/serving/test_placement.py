"""Placement options of a replica, and the nodes on which Ray places it; the GPUs are declared, not real."""

import json
import subprocess
import sys
import textwrap

import pytest

from rayk.config import Resources, parse_config
from rayk.serving.application import placement_options
from tests.config.test_config import changed
from tests.runs import PATIENCE_SECONDS, environment

TEACHER = {"name": "big", "model": "models/big"}


def engine_of(**engine):
    return parse_config(changed(teachers=[TEACHER | {"engine": engine}])).teachers[0].engine


@pytest.mark.parametrize(
    ("engine", "gpus"),
    [
        ({}, 1),
        ({"kind": "vllm"}, 1),
        ({"kind": "vllm", "tensor_parallel_size": 4, "across_nodes": True}, 4),
        ({"kind": "vllm", "tensor_parallel_size": 4, "pipeline_parallel_size": 2}, 8),
        ({"kind": "vllm", "tensor_parallel_size": 2, "data_parallel_size": 4, "expert_parallel": True}, 8),
    ],
)
def test_replica_has_a_gpu_per_engine_process(engine, gpus):
    assert engine_of(**engine).gpus == gpus


def test_replica_on_one_node_reserves_its_gpus():
    options = placement_options(Resources(num_cpus=2, custom={"a": 0.5}), 4.0, across_nodes=False)
    assert list(options) == ["ray_actor_options"]
    actor = options["ray_actor_options"]
    assert (actor["num_cpus"], actor["num_gpus"], actor["resources"]) == (2, 4.0, {"a": 0.5})


def test_replica_across_nodes_leaves_the_gpus_to_the_engine():
    options = placement_options(Resources(num_cpus=2, custom={"a": 0.5}), 3.0, across_nodes=True)
    assert options["ray_actor_options"]["num_gpus"] == 0
    assert options["placement_group_bundles"] == [{"CPU": 2, "GPU": 1, "a": 0.5}, {"GPU": 1}, {"GPU": 1}]
    assert options["placement_group_strategy"] == "PACK"
    without_gpus = placement_options(Resources(), 0.0, across_nodes=True)
    assert "placement_group_bundles" not in without_gpus


def test_labels_choose_the_node_of_the_replica_or_the_nodes_of_its_bundles():
    labeled = Resources(labels={"rayk/group": "teacher"})
    assert placement_options(labeled, 1.0, across_nodes=False)["ray_actor_options"]["label_selector"] == labeled.labels
    spread = placement_options(labeled, 2.0, across_nodes=True)
    assert spread["placement_group_bundle_label_selector"] == [labeled.labels]
    assert "label_selector" not in spread["ray_actor_options"]
    assert "label_selector" not in placement_options(Resources(), 1.0, across_nodes=False)["ray_actor_options"]


def test_replicas_keep_the_variables_that_a_job_sets(monkeypatch):
    # A test before this one may have left the cluster that rayk started for it.
    monkeypatch.setattr("rayk.serving.application.is_own_cluster", lambda: False)
    job = {"runtime_env": {"env_vars": {"TOKENIZERS_PARALLELISM": "true"}}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    variables = placement_options(Resources(), 0.0, across_nodes=False)["ray_actor_options"]["runtime_env"]["env_vars"]
    assert "TOKENIZERS_PARALLELISM" not in variables
    assert variables["OMP_WAIT_POLICY"] == "PASSIVE"


@pytest.mark.cluster
@pytest.mark.long
def test_ray_places_a_replica_on_several_nodes():
    """A separate cluster in a separate process, with three nodes that declare GPUs."""
    code = """
        import ray
        from ray.cluster_utils import Cluster

        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 100 << 20})
        for _ in range(2):
            nodes.add_node(num_cpus=1, num_gpus=2, object_store_memory=100 << 20)
        ray.init(address=nodes.address, log_to_driver=False)

        from rayk.config import Replicas, Resources
        from rayk.serving import application

        class Replica:
            def __init__(self, settings):
                pass

            def group(self):
                return ray.util.get_current_placement_group().id.hex()

        application.start_application(
            "big", Replica, {}, Replicas(), Resources(num_cpus=0.5), gpus=3.0, label="It", across_nodes=True
        )
        handle = ray.serve.get_deployment_handle(application.DEPLOYMENT, app_name="big")
        group = ray.util.placement_group_table()[handle.group.remote().result(timeout_s=60)]
        placed = group["bundles_to_node_id"].values()
        print("placed", group["state"], sorted(list(placed).count(node) for node in set(placed)))
        ray.serve.shutdown()
        ray.shutdown()
        nodes.shutdown()
    """
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment(),
        timeout=PATIENCE_SECONDS, check=False,
    )  # fmt: skip
    assert "placed CREATED [1, 2]" in process.stdout, process.stderr[-2000:]
