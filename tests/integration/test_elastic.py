"""Training whose number of workers follows the cluster: one node is announced to go and goes, another one comes."""

import subprocess
import sys
import textwrap

import pytest
import yaml

from rayk.config import parse_config
from rayk.run import distill
from rayk.training.checkpoint import CheckpointStore
from tests.runs import PATIENCE_SECONDS, assert_losses_close, curve, environment, settings

pytestmark = pytest.mark.cluster

PROGRAM = """
    import os, sys, threading
    import ray, yaml
    from ray.cluster_utils import Cluster
    from ray.core.generated import autoscaler_pb2

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 100 << 20})

    def add():
        return nodes.add_node(num_cpus=1, resources={"student": 1}, object_store_memory=100 << 20)

    add(), (second := add())
    ray.init(address=nodes.address, log_to_driver=False)

    from rayk.config import parse_config
    from rayk.run import distill
    from rayk.training import trainer
    from rayk.training.checkpoint import CheckpointStore
    from tests.runs import curve, wait_until

    trainer._RESIZE_SECONDS = 2.0
    config = parse_config(yaml.safe_load(open(sys.argv[1])))
    store = CheckpointStore(config.checkpoints)

    def has_checkpoint_of(world, after=0):
        return next((found.step for found in store.manifests() if found.world == world and found.step > after), None)

    threading.Thread(target=distill, args=[config], daemon=True).start()
    wait_until(lambda: len(curve(config.output_path)) > 5, "five steps")
    assert not store.steps(), "a checkpoint before one is due"
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    client = ray._raylet.GcsClient(address=nodes.address)
    client.drain_node(second.node_id, reason, "a test", 0)
    step = wait_until(lambda: has_checkpoint_of(2), "a checkpoint at the announcement")
    print("announced", step, flush=True)
    nodes.remove_node(second)
    wait_until(lambda: curve(config.output_path, "step")[-1:] > [step + 3], "steps of one worker")
    add()
    step = wait_until(lambda: has_checkpoint_of(1), "a checkpoint of one worker")
    print("alone", step, flush=True)
    step = wait_until(lambda: has_checkpoint_of(2, step), "a checkpoint of two workers again")
    print("together", step, flush=True)
    os._exit(0)
"""


@pytest.mark.nightly
def test_workers_follow_the_nodes_and_learn_the_same(tmp_path, tiny_student):
    values = settings(
        tmp_path, tiny_student, workers={"min": 1, "max": 2}, steps=100_000, schedule="constant", micro_batch_tokens=64,
        learning_rate=1e-3, batch_size=32, checkpoint_every_minutes=0.1, keep_checkpoints=1000,
        checkpoint_every_steps=10_000, resources={"num_cpus": 1, "custom": {"student": 1}},
    )  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(path)], capture_output=True, text=True,
        env=environment(), timeout=2 * PATIENCE_SECONDS, check=False,
    )  # fmt: skip
    assert "together" in done.stdout, done.stdout + done.stderr[-3000:]
    newest = CheckpointStore(parse_config(values).checkpoints).steps()[-1]
    ours = curve(values["output"])[:newest]
    assert curve(values["output"], "step")[:newest] == list(range(1, newest + 1))
    values |= {"output": str(tmp_path / "alone")}
    values["training"] |= {"workers": 0, "steps": newest, "resources": {"num_cpus": 0.5}}
    distill(parse_config(values))
    assert_losses_close(ours, curve(values["output"]), 1e-3)
