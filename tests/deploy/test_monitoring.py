"""The dashboard's and alerts' queries are PromQL on metrics of Ray and of rayk."""

import json

import promql_parser
import pytest
import yaml

from rayk.serving.metrics import COUNTERS, GAUGES
from tests.deploy.manifests import DEPLOY, kustomize, of_kind, parse

DASHBOARD = json.loads((DEPLOY / "components" / "grafana-dashboard" / "rayk.json").read_text())
(RULES,) = parse((DEPLOY / "components" / "alerts" / "rules.yaml").read_text())


EXPORTED = {f"ray_{name}_total" for name in COUNTERS} | {f"ray_{name}" for name in GAUGES}


def panel_queries():
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def alert_queries():
    """Return each alert's query."""
    return {rule["alert"]: rule["expr"] for group in RULES["spec"]["groups"] for rule in group["rules"]}


def metric_names(query):
    """Return the names of the metrics in a query."""
    found = set()

    def visit(node):
        selector = getattr(node, "vector_selector", node)
        if isinstance(selector, promql_parser.VectorSelector):
            found.add(selector.name)
        for name in ("expr", "lhs", "rhs", "args"):
            child = getattr(node, name, None)
            for part in child if isinstance(child, list) else [child]:
                if part is not None:
                    visit(part)

    visit(promql_parser.parse(query))
    return found


def test_queries_are_promql_on_rays_metrics():
    queries = [*panel_queries(), *alert_queries().values()]
    assert len(queries) >= 18
    for query in queries:
        names = metric_names(query)
        assert names, query
        assert all(name.startswith("ray_") for name in names), names
        assert {name for name in names if name.startswith("ray_rayk_")} <= EXPORTED, names


def test_the_dashboard_shows_what_rayk_exports():
    shown = {name for query in panel_queries() for name in metric_names(query)}
    assert EXPORTED - shown == {f"ray_rayk_{name}_total" for name in (
        "client_bytes", "client_calls", "client_wait_seconds", "run_cached_tokens", "run_skipped_rows"
    )}  # fmt: skip


def test_a_broken_query_is_refused():
    with pytest.raises(ValueError):
        metric_names("sum by (application (rate(ray_tasks[2m]))")


def test_panels_do_not_overlap_and_say_what_they_show():
    cells = [(p["gridPos"]["x"] + x, p["gridPos"]["y"] + y) for p in DASHBOARD["panels"]
             for x in range(p["gridPos"]["w"]) for y in range(p["gridPos"]["h"])]  # fmt: skip
    assert len(set(cells)) == len(cells)
    assert all(panel["description"] for panel in DASHBOARD["panels"])


def test_monitor_selects_the_pods_and_their_port():
    (monitor,) = parse((DEPLOY / "components" / "pod-monitor" / "monitor.yaml").read_text())
    (job,) = of_kind(kustomize(DEPLOY / "base" / "job"), "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        labels = group["template"]["metadata"]["labels"]
        assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
        ports = {port["name"] for port in group["template"]["spec"]["containers"][0]["ports"]}
        assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= ports


def test_dashboard_is_found_by_grafanas_sidecar():
    component = yaml.safe_load((DEPLOY / "components" / "grafana-dashboard" / "kustomization.yaml").read_text())
    (generated,) = component["configMapGenerator"]
    assert generated["options"]["labels"] == {"grafana_dashboard": "1"}
