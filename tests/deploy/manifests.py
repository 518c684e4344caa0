"""The objects of `deploy/` as kustomize and helm build them, and their parts."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rayk.config import RunConfig, parse_config
from tests.deploy import tools

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "deploy"
BUILDS = sorted(
    path.parent for folder in ("base", "overlays") for path in (DEPLOY / folder).glob("*/kustomization.yaml")
)
COMPONENTS = sorted(path.parent for path in (DEPLOY / "components").glob("*/kustomization.yaml"))

Object = dict[str, Any]


@functools.lru_cache
def _render(folder: Path) -> str:
    return tools.run("kubectl", "kustomize", folder).stdout


def kustomize(folder: Path) -> list[Object]:
    """Build a folder with a `kustomization.yaml`."""
    return parse(_render(folder))


def with_components(components: list[Path], folder: Path) -> list[Object]:
    """Build the base's job with `components`, in a new kustomization in `folder`, which is inside `deploy/overlays`."""
    names = [f"../../components/{component.name}" for component in components]
    content = {"resources": ["../../base/job"], "components": names}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(content))
    return parse(tools.run("kubectl", "kustomize", folder).stdout)


def helm(*arguments: object) -> list[Object]:
    """Render the chart, whose folder is `deploy/`."""
    return parse(tools.run("helm", "template", "release", DEPLOY, *arguments).stdout)


def parse(text: str) -> list[Object]:
    return [item for item in yaml.safe_load_all(text) if item]


def by_name(objects: list[Object]) -> dict[tuple[str, str], Object]:
    return {(item["kind"], item["metadata"]["name"]): item for item in objects}


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [item for item in objects if item["kind"] in kinds]


def cluster_spec(item: Object) -> Object | None:
    """Return the Ray cluster that an object defines; None if it defines none."""
    paths = {"RayCluster": ["spec"], "RayJob": ["spec", "rayClusterSpec"], "RayService": ["spec", "rayClusterConfig"]}
    for key in paths.get(item["kind"], ["none"]):
        item = item.get(key) or {}
    return item or None


@dataclass(frozen=True)
class Group:
    """The head (`name` "head") or a worker group of a Ray cluster."""

    name: str
    spec: Object

    @property
    def pod(self) -> Object:
        return self.spec["template"]["spec"]

    @property
    def container(self) -> Object:
        return self.pod["containers"][0]

    @property
    def labels(self) -> dict[str, str]:
        return self.spec.get("labels", {})

    def amount(self, resource: str, kind: str = "limits") -> float:
        """Return the CPUs or GPUs of one pod."""
        text = str(self.container["resources"][kind].get(resource, 0))
        return float(text[:-1]) / 1000 if text.endswith("m") else float(text)


def groups(cluster: Object) -> Iterator[Group]:
    yield Group("head", cluster["headGroupSpec"])
    yield from worker_groups(cluster)


def worker_groups(cluster: Object) -> Iterator[Group]:
    for spec in cluster.get("workerGroupSpecs", []):
        yield Group(spec["groupName"], spec)


def entrypoints(objects: list[Object]) -> list[str]:
    return [item["spec"]["entrypoint"] for item in of_kind(objects, "RayJob")]


def run_config(objects: list[Object]) -> RunConfig | None:
    """Return the run of the ConfigMap that the pods mount; None without one."""
    for item in of_kind(objects, "ConfigMap"):
        if "run.yaml" in item["data"]:
            return parse_config(yaml.safe_load(item["data"]["run.yaml"]))
    return None
