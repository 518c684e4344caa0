"""The checks of KubeRay 1.7: the schemas of its custom resources, and the rules of its operator outside the schemas."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import yaml
from jsonschema import Draft202012Validator

from tests.deploy.manifests import Object, cluster_spec, groups, worker_groups

SCHEMA = json.loads((Path(__file__).parent / "kuberay.schema.json").read_text())
LONGEST_NAME = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
"""The operator appends to the names of RayJobs and RayServices for their clusters."""
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_RESOURCE_PARAMETERS = {"num-cpus", "num-gpus", "memory", "resources"}
_UPGRADES = {None, "None", "NewCluster", "NewClusterWithIncrementalUpgrade"}


def problems(item: Object) -> list[str]:
    """Return why KubeRay would refuse an object, as sentences; empty for one that it accepts."""
    if not item["apiVersion"].startswith("ray.io/"):
        return []
    found = list(_schema_problems(item))
    if found:
        return found  # the rules read fields that the schema requires
    found = list(_name_problems(item))
    cluster = cluster_spec(item)
    if cluster is not None:
        found += _cluster_problems(cluster, owned=item["kind"] != "RayCluster")
    if item["kind"] == "RayJob":
        found += _job_problems(item, cluster)
    if item["kind"] == "RayService":
        found += _service_problems(item["spec"])
    return found


def _schema_problems(item: Object) -> Iterator[str]:
    schema = {"$defs": SCHEMA["$defs"], "$ref": f"#/$defs/{item['kind']}"}
    for error in Draft202012Validator(schema).iter_errors(item):
        yield f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}"


def _name_problems(item: Object) -> Iterator[str]:
    name = item["metadata"]["name"]
    if not _NAME.fullmatch(name):
        yield f"the name '{name}' is no DNS label"
    if len(name) > LONGEST_NAME[item["kind"]]:
        yield f"the name '{name}' is longer than {LONGEST_NAME[item['kind']]} characters"


def _cluster_problems(cluster: Object, owned: bool) -> Iterator[str]:
    if owned and "upgradeStrategy" in cluster:
        yield "upgradeStrategy is for a RayCluster alone"
    for group in groups(cluster):
        parameters = group.spec.get("rayStartParams", {})
        if group.spec.get("resources") and _RESOURCE_PARAMETERS & parameters.keys():
            yield f"{group.name}: resources are in rayStartParams and in 'resources'"
        if "labels" in parameters:
            yield f"{group.name}: labels are in rayStartParams"
        for key, value in group.labels.items():
            if not _LABEL_KEY.fullmatch(key) or not _LABEL_VALUE.fullmatch(value):
                yield f"{group.name}: '{key}: {value}' is no label"
    names = [group.name for group in worker_groups(cluster)]
    if len(set(names)) < len(names):
        yield f"worker groups share a name: {names}"
    yield from _autoscaler_problems(cluster)
    yield from _authentication_problems(cluster)
    yield from _state_problems(cluster)


def _autoscaler_problems(cluster: Object) -> Iterator[str]:
    scales = cluster.get("enableInTreeAutoscaling", False)
    version = cluster.get("autoscalerOptions", {}).get("version")
    variable = _head_variables(cluster).get("RAY_enable_autoscaler_v2", "")
    if not scales and variable in ("1", "true"):
        yield "RAY_enable_autoscaler_v2 is set without autoscaling"
    if scales and version and variable:
        yield "the autoscaler's version is set twice"
    for group in groups(cluster):
        if scales and version == "v2" and group.pod.get("restartPolicy", "Never") != "Never":
            yield f"{group.name}: restartPolicy must be Never for autoscaler v2"
        if scales and group.spec.get("suspend"):
            yield f"{group.name} is suspended while autoscaling"


def _authentication_problems(cluster: Object) -> Iterator[str]:
    if cluster.get("authOptions", {}).get("mode") == "token":
        version = [int(part) for part in re.findall(r"\d+", cluster.get("rayVersion", "0"))]
        if version < [2, 52]:
            yield "token authentication needs rayVersion 2.52 or newer"


def _state_problems(cluster: Object) -> Iterator[str]:
    options = cluster.get("gcsFaultToleranceOptions")
    variables = _head_variables(cluster)
    parameters = cluster["headGroupSpec"].get("rayStartParams", {})
    if options is None and "RAY_REDIS_ADDRESS" in variables:
        yield "RAY_REDIS_ADDRESS is set without gcsFaultToleranceOptions"
    if options is not None and {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD"} & variables.keys():
        yield "Redis is set in gcsFaultToleranceOptions and in variables"
    if options is not None and "redis-password" in parameters:
        yield "the Redis password is set in gcsFaultToleranceOptions and in rayStartParams"


def _head_variables(cluster: Object) -> dict[str, str]:
    head = next(groups(cluster))
    return {variable["name"]: variable.get("value", "") for variable in head.container.get("env", [])}


def _job_problems(item: Object, cluster: Object | None) -> Iterator[str]:
    spec, labels = item["spec"], item["metadata"].get("labels", {})
    mode, selector = spec.get("submissionMode", "K8sJobMode"), spec.get("clusterSelector")
    shuts_down, rules = spec.get("shutdownAfterJobFinishes", False), spec.get("deletionStrategy", {})
    scales = (cluster or {}).get("enableInTreeAutoscaling", False)
    if (cluster is None) == (selector is None):
        yield "needs either rayClusterSpec or clusterSelector"
    if selector is not None and not selector.get("ray.io/cluster"):
        yield "clusterSelector needs ray.io/cluster"
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not shuts_down:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if rules.get("deletionRules") and shuts_down:
        yield "deletionRules excludes shutdownAfterJobFinishes"
    if spec.get("suspend") and (selector is not None or not shuts_down):
        yield "suspend needs a cluster of its own and shutdownAfterJobFinishes"
    if spec.get("backoffLimit", 0) > 0 and (selector is not None or mode == "InteractiveMode"):
        yield "backoffLimit is incompatible with clusterSelector and InteractiveMode"
    if mode == "SidecarMode":
        if selector is not None or {"submitterConfig", "submitterPodTemplate"} & spec.keys():
            yield "SidecarMode has neither clusterSelector nor settings of a submitter"
        if cluster is not None and next(groups(cluster)).pod.get("restartPolicy", "Never") != "Never":
            yield "SidecarMode needs restartPolicy Never of the head"
    for rule in rules.get("deletionRules", []):
        if rule["policy"] == "DeleteWorkers" and scales:
            yield "DeleteWorkers is incompatible with autoscaling"
    try:
        yaml.safe_load(spec.get("runtimeEnvYAML", ""))
    except yaml.YAMLError:
        yield "runtimeEnvYAML is no YAML"
    if "kueue.x-k8s.io/queue-name" in labels and (selector is not None or not shuts_down or scales):
        yield "Kueue needs a cluster of its own without autoscaling, and shutdownAfterJobFinishes"


def _service_problems(spec: Object) -> Iterator[str]:
    if spec.get("upgradeStrategy", {}).get("type") not in _UPGRADES:
        yield "the type of upgradeStrategy is unknown"
