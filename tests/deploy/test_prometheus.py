"""The dashboard's and alerts' queries on a real Prometheus that reads from a cluster on which a run trains."""

import json
import shutil
import signal
import subprocess
import urllib.parse
import urllib.request

import pytest
import yaml

from tests.clusters import LocalCluster, free_ports
from tests.deploy.test_monitoring import alert_queries, metric_names, panel_queries
from tests.runs import actor_processes, rayk, settings, wait_until

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.nightly,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs Prometheus, Debian's package 'prometheus'"),
]

WITHOUT_ANSWER = {
    "ray_node_gpus_utilization", "ray_node_gram_used",  # no GPU
    "ray_serve_deployment_error_counter_total",  # no call failed
}  # fmt: skip


@pytest.fixture(scope="module")
def cluster():
    with LocalCluster() as cluster:
        cluster.start_head(cpus=8)
        yield cluster


@pytest.fixture(scope="module")
def ask(cluster, tmp_path_factory):
    """Start a Prometheus that reads from the cluster every second; return a function that returns a query's series."""
    folder = tmp_path_factory.mktemp("prometheus")
    targets = {"files": [f"{cluster.folder}/prom_metrics_service_discovery.json"]}
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [{"job_name": "ray", "file_sd_configs": [targets | {"refresh_interval": "1s"}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    [port] = free_ports(1)
    command = [
        "prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip

    def series(query):
        query = query.replace("$cluster", ".*")
        url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]["result"]

    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        wait_until(lambda: "Server is ready" in (folder / "log").read_text(), "Prometheus", process)
        yield series
        process.terminate()


def test_queries_have_answers_while_a_run_trains(cluster, ask, tmp_path, tiny_student, tiny_teacher):
    values = settings(tmp_path, tiny_student, "on_policy", workers=1, steps=100_000)
    values["rollouts"]["max_staleness"] = 1
    values["teachers"] = [{"name": "own", "model": tiny_teacher, "resources": {"num_cpus": 0.5}}]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    with rayk("run", tmp_path / "run.yaml", log=tmp_path / "log", RAY_ADDRESS=cluster.address) as process:
        for query in panel_queries():
            if not WITHOUT_ANSWER & metric_names(query):
                wait_until(lambda query=query: ask(query), f"an answer to {query}", process, seconds=90)
        rate = "sum by (run) (rate(ray_rayk_run_tokens_total[2m])) > 0"
        wait_until(lambda: ask(rate), f"an answer to {rate}", process, seconds=90)
        for name, query in alert_queries().items():
            assert not ask(query), f"{name} in an undisturbed run"
        process.terminate()
        process.wait()


def test_alerts_about_replicas(cluster, ask, tmp_path, tiny_teacher):
    missing = alert_queries()["RaykTeacherWithoutReplicas"]
    starts = alert_queries()["RaykTeacherRestarts"].partition(" > 5")[0]
    slow = {"kind": "simulated", "start_seconds": 30, "tokens_per_second": 1e6}
    teacher = {"name": "slow", "model": tiny_teacher, "resources": {"num_cpus": 0.5}, "engine": slow}
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump({"teachers": [teacher]}))

    def wait_for(query, is_answered=True):
        wait_until(lambda: bool(ask(query)) == is_answered, f"{is_answered} for {query}", process, seconds=90)

    with rayk("serve", tmp_path / "teacher.yaml", log=tmp_path / "log", RAY_ADDRESS=cluster.address) as process:
        wait_for(missing)
        wait_for(missing, is_answered=False)
        [replica] = actor_processes("ServeReplica:slow:", cluster.nodes["head"].pid)
        replica.kill()
        wait_for(f"{missing} unless on (application) ray_serve_deployment_replica_healthy")  # whose series is gone
        wait_for(f"{starts} == 2")
        wait_for(missing, is_answered=False)
        process.send_signal(signal.SIGINT)
        process.wait()
    wait_until(lambda: not ask('ray_serve_autoscaling_target_replicas{application="slow"}'), "its removal")
    assert not ask(missing)


def test_alert_about_workers_that_are_not_scheduled(cluster, ask, tmp_path, tiny_student):
    values = settings(tmp_path, tiny_student, workers=1, resources={"num_cpus": 100})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    query = alert_queries()["RaykWorkersNotScheduled"]
    with rayk("run", tmp_path / "run.yaml", log=tmp_path / "log", RAY_ADDRESS=cluster.address) as process:
        wait_until(lambda: ask(query), query, process, seconds=90)
    wait_until(lambda: not ask(query), f"no answer to {query}", seconds=90)
