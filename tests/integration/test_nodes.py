"""A run on several nodes, each with a raylet of its own: labels place teachers and students."""

import pytest
import yaml

from tests.clusters import LocalCluster
from tests.runs import actor_processes, curve, metrics, rayk, settings, wait_until

pytestmark = pytest.mark.cluster


@pytest.mark.nightly
def test_labels_place_teachers_and_students_on_their_nodes(tmp_path, tiny_student, tiny_teacher):
    """The head has room for all of them, and either node for the other's part. The students' node comes late."""
    values = settings(tmp_path, tiny_student, "logit_kd", workers=2, steps=60)
    values["training"]["resources"] = {"num_cpus": 0.5, "labels": {"rayk/group": "trainer"}}
    resources = {"num_cpus": 0.5, "labels": {"rayk/group": "teacher"}}
    values["teachers"] = [{"name": "own", "model": tiny_teacher, "replicas": 2, "resources": resources}]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    with LocalCluster() as cluster:
        cluster.start_head(cpus=4)
        cluster.start_node("teacher", cpus=4, labels={"rayk/group": "teacher"})
        log = tmp_path / "log"
        with rayk("run", tmp_path / "run.yaml", log=log, RAY_ADDRESS=cluster.address) as process:
            said = "No node has the labels of the training workers (rayk/group=trainer). It waits until"
            wait_until(lambda: said in " ".join(log.read_text().split()), "the sentence", process)
            cluster.start_node("trainer", cpus=4, labels={"rayk/group": "trainer"})
            wait_until(lambda: len(metrics(tmp_path / "run")) >= 3, "step 3", process)
            placed = {
                (title, node): len(actor_processes(title, started.pid))
                for node, started in cluster.nodes.items()
                for title in ("ServeReplica:own-", "RayTrainWorker")
            }
            wait_until(lambda: process.poll() is not None, "the end of the run")
        assert process.returncode == 0
    assert {where: count for where, count in placed.items() if count} == {
        ("ServeReplica:own-", "teacher"): 2,
        ("RayTrainWorker", "trainer"): 2,
    }
    assert curve(tmp_path / "run", "step") == list(range(1, 61))
