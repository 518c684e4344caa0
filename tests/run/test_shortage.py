"""A run that requires more than the cluster has is reported before anything waits."""

import pytest

from rayk.config import parse_config
from rayk.run.applications import describe_shortage

WAITS = "It waits until nodes are added."


def node(labels=None, alive=True, **resources):
    return {"Alive": alive, "Resources": resources, "Labels": labels or {}}


@pytest.fixture
def config():
    labels = {"rayk/group": "trainer"}
    return parse_config(
        {
            "teachers": [{"name": "big", "model": "t", "replicas": 2, "resources": {"num_cpus": 2, "num_gpus": 4}}],
            "student": {"model": "s"},
            "data": {"train": {"path": "rows.jsonl"}},
            "method": {"kind": "logit_kd"},
            "training": {"workers": 3, "resources": {"num_cpus": 1, "num_gpus": 1, "labels": labels}},
        }
    )


def test_the_total_demand_is_compared_with_the_living_nodes(config):
    nodes = [node(CPU=4, GPU=8), node(CPU=3, GPU=2, labels={"rayk/group": "trainer"}), node(alive=False, CPU=9, GPU=9)]
    said = describe_shortage(config, nodes)
    assert said.startswith("The run requires 11 GPUs at the same time (teacher 'big' 8, the training workers 3), but")
    assert "there are 10; lower" in said and said.endswith(WAITS)
    nodes[1]["Resources"]["GPU"] = 3
    assert describe_shortage(config, nodes) is None


def test_a_node_with_the_labels_must_be_alive(config):
    nodes = [node(CPU=9, GPU=99), node(labels={"rayk/group": "trainer"}, alive=False)]
    said = f"No node has the labels of the training workers (rayk/group=trainer). {WAITS}"
    assert describe_shortage(config, nodes) == said
    config.training.resources.labels["rayk/group"] = "in(trainer,student)"
    assert describe_shortage(config, nodes) is None
