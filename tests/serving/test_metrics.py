"""rayk's metrics reach the endpoint from which Prometheus reads, under the names in the page and the dashboard."""

import re
import urllib.request
from pathlib import Path

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from rayk.config.support import TopK
from rayk.serving.metrics import COUNTERS, GAUGES, RunMetrics, Statistics, tag_of
from tests.runs import wait_until
from tests.teachers.helpers import random_sequences

PAGE = (Path(__file__).parents[2] / "rayk" / "serving" / "README.md").read_text(encoding="utf-8")


def test_page_lists_every_metric():
    listed = dict(re.findall(r"^\| `(rayk_\w+)` \| (.*) \|$", PAGE, re.MULTILINE))
    assert listed == COUNTERS | GAUGES


def exported_value(name: str, tag: str) -> float:
    """Return a metric's value at the cluster's endpoint, the sum over its processes; 0 if it is not there yet."""
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    name = f"ray_{name}_total" if name in COUNTERS else f"ray_{name}"
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    key = tag_of(name.removeprefix("ray_"))
    return sum(sample.value for sample in samples if sample.labels.get(key) == tag)


@pytest.mark.long  # Ray exports every ten seconds
def test_counters_are_exported_before_their_first_increase(ray_cluster):
    Statistics("unused")
    RunMetrics("waiting")
    for name in COUNTERS:
        if name.startswith(("rayk_client_", "rayk_run_")):
            tag = "waiting" if tag_of(name) == "run" else "unused"
            assert wait_until(lambda name=name, tag=tag: exported_value(name, tag), name) < 1e-300, name


@pytest.mark.long
def test_metrics_of_replicas_clients_and_runs_are_exported(served):
    sequences = random_sequences(20)
    signals = served.score(sequences, TopK(4))
    served.generate(["2 + 2 ="], max_new_tokens=4)
    row = {"step": 7, "loss": 0.5, "tokens": 30, "cached_tokens": 0, "step_seconds": 2.0, "teacher_wait_seconds": 0.5,
           "rollout_staleness": 1.0, "student_mass": 0.75}  # fmt: skip
    run = RunMetrics("a-run", restarts=2)
    run.record(row)
    run.record(row | {"step": 8, "loss": 0.25})
    expected = {
        "rayk_run_step": 8, "rayk_run_loss": 0.25, "rayk_run_tokens": 60, "rayk_run_seconds": 4.0,
        "rayk_run_teacher_wait_seconds": 1.0, "rayk_run_staleness": 1.0, "rayk_run_student_mass": 0.75,
        "rayk_run_restarts": 2,
    }  # fmt: skip
    for name, value in expected.items():
        wait_until(lambda name=name, value=value: exported_value(name, "a-run") == value, f"{name} = {value}")
    totals = {"rayk_scored_tokens": sum(map(len, sequences)), "rayk_client_tokens": signals.tokens,
              "rayk_client_calls": 1, "rayk_generated_tokens": 1}  # fmt: skip
    for name, least in totals.items():  # other tests of the session use this teacher, too
        wait_until(lambda name=name, least=least: exported_value(name, "served") >= least, name)
    assert exported_value("rayk_waiting_tokens", "served") == 0
