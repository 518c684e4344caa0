"""Requirements on rayk's own pods: security settings, shared memory, GPUs, and the resources that the run asks for."""

import re
from collections.abc import Iterator

import rayk
from rayk.config import Resources, RunConfig
from rayk.run.applications import resource_needs
from tests.deploy.manifests import DEPLOY, Group, Object, groups, worker_groups

IMAGES = set(re.findall(r"^FROM \S+ AS (trainer|teacher|cpu)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE))
"""Targets of the Dockerfile; an image's name is rayk-TARGET."""


def pod_problems(cluster: Object) -> Iterator[str]:
    """Yield what the pods of a Ray cluster lack, as sentences."""
    if cluster["headGroupSpec"].get("rayStartParams", {}).get("num-cpus") != "0":
        yield "the head accepts work"
    for group in groups(cluster):
        scales = group.name == "head" and cluster.get("enableInTreeAutoscaling", False)
        yield from (f"{group.name}: {problem}" for problem in _group_problems(group, scales))


def _group_problems(group: Group, scales: bool) -> Iterator[str]:
    pod = group.pod
    security = pod.get("securityContext", {})
    if not security.get("runAsNonRoot") or not security.get("runAsUser"):
        yield "the pod may run as root"
    if pod.get("automountServiceAccountToken", True) != scales:
        yield "the pod has a token of the Kubernetes API without need, or needs one"
    if "terminationGracePeriodSeconds" not in pod:
        yield "no stop time"
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        yield from _container_problems(container, pod)
    if group.container["resources"]["requests"].keys() != group.container["resources"]["limits"].keys():
        yield "requests and limits name other resources"
    gpu = "nvidia.com/gpu"
    if group.amount(gpu, "requests") != group.amount(gpu):
        yield "requests and limits of GPUs differ"
    if group.amount(gpu) and not any(toleration.get("key") == gpu for toleration in pod.get("tolerations", [])):
        yield "the taint of GPU nodes is not tolerated"
    mounts = {mount["name"]: mount["mountPath"] for mount in group.container.get("volumeMounts", [])}
    memory = [volume["name"] for volume in pod["volumes"] if volume.get("emptyDir", {}).get("medium") == "Memory"]
    if "/dev/shm" not in [mounts.get(name) for name in memory]:
        yield "/dev/shm is no memory"
    if missing := mounts.keys() - {volume["name"] for volume in pod["volumes"]}:
        yield f"volumes are missing: {missing}"


def _container_problems(container: Object, pod: Object) -> Iterator[str]:
    security = container.get("securityContext", {})
    if security.get("allowPrivilegeEscalation", True) or security.get("capabilities") != {"drop": ["ALL"]}:
        yield f"{container['name']} keeps privileges"
    name, _, tag = container["image"].rpartition("/")[2].partition(":")
    if name.removeprefix("rayk-") not in IMAGES or tag != rayk.__version__:
        yield f"the image {container['image']} is not built here"


def resource_problems(cluster: Object, config: RunConfig) -> Iterator[str]:
    """Yield where worker groups and a run's demand differ, as sentences.

    All replicas and workers of the run must fit into the pods of the groups with their labels, and no GPU of a group
    may be left over.
    """
    found = list(worker_groups(cluster))
    asked = {group.name: 0.0 for group in found}
    places = {group.name: [[group.amount("cpu"), group.amount("nvidia.com/gpu")] for _ in range(_most(group))]
              for group in found}  # fmt: skip
    for need in [need for phase in resource_needs(config) for need in phase]:
        matching = [group for group in found if need.resources.labels.items() <= group.labels.items()]
        if not need.resources.labels or len(matching) != 1:
            yield f"{need.name}: labels {need.resources.labels} choose {len(matching)} groups"
            continue
        (group,) = matching
        gpus = need.resources.num_gpus
        if gpus is None:
            yield f"{need.name}: num_gpus is not set, and a cluster without nodes has none"
            continue
        asked[group.name] += need.most * gpus
        if not _fits(need.most, need.resources, gpus, places[group.name]):
            yield f"{need.name}: {need.most} times {need.resources.num_cpus:g} CPUs and {gpus:g} GPUs do not fit"
    for group in found:
        there = _most(group) * group.amount("nvidia.com/gpu")
        if asked[group.name] != there:
            yield f"{group.name} has {there:g} GPUs, the run asks for {asked[group.name]:g}"


def _most(group: Group) -> int:
    """Return the largest number of pods of a group."""
    return max(group.spec["replicas"], group.spec["maxReplicas"])


def _fits(count: int, resources: Resources, gpus: float, pods: list[list[float]]) -> bool:
    """Place `count` copies on pods, a list of [CPUs, GPUs] that are left; return whether all have a place."""
    for _ in range(count):
        for pod in pods:
            if pod[0] >= resources.num_cpus and pod[1] >= gpus:
                pod[0] -= resources.num_cpus
                pod[1] -= gpus
                break
        else:
            return False
    return True
