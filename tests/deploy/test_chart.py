"""The chart renders the objects of the kustomizations, and its schema refuses other values."""

import pytest
import yaml

import rayk
from tests.deploy import tools
from tests.deploy.manifests import DEPLOY, by_name, helm, kustomize
from tests.deploy.test_manifests import all_problems

OVERLAYS = sorted(path.stem for path in (DEPLOY / "values").glob("*.yaml"))


def test_default_values_render_the_base():
    assert by_name(helm()) == by_name(kustomize(DEPLOY / "base" / "job"))


@pytest.mark.parametrize("name", OVERLAYS)
def test_values_render_the_overlay(name):
    folder = DEPLOY / "overlays" / name
    run = folder / "run.yaml"
    given = ["--set-file", f"run={run}"] if run.exists() else []
    assert by_name(helm("--values", DEPLOY / "values" / f"{name}.yaml", *given)) == by_name(kustomize(folder))


def test_every_overlay_but_the_smoke_test_has_values():
    assert {path.name for path in (DEPLOY / "overlays").iterdir() if path.is_dir()} == {*OVERLAYS, "kind"}


def test_settings_reach_all_pods():
    objects = by_name(helm(
        "--set", "name=other,image.registry=registry.example.com/team,image.tag=1.2.3,storage.claim=mine",
        "--set", "serviceAccount=mine,output=/mnt/rayk/runs/other,tokenAuthentication=false",
    ))  # fmt: skip
    job = objects["RayJob", "other"]
    assert objects["ConfigMap", "other-config"]
    assert job["spec"]["entrypoint"] == "rayk run /etc/rayk/run.yaml --output /mnt/rayk/runs/other --resume"
    cluster = job["spec"]["rayClusterSpec"]
    assert "authOptions" not in cluster
    pods = [group["template"]["spec"] for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]]
    names = ("trainer", "teacher", "trainer")
    assert [pod["containers"][0]["image"] for pod in pods] == [
        f"registry.example.com/team/rayk-{name}:1.2.3" for name in names
    ]
    for pod in pods:
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["config"]["configMap"]["name"] == "other-config"
        assert volumes["rayk"]["persistentVolumeClaim"]["claimName"] == "mine"
        assert pod["serviceAccountName"] == "mine"


def test_another_run_is_checked_like_the_overlays():
    assert all_problems(helm("--set", "trainer.replicas=2,trainer.maxReplicas=2")) == [
        "trainer has 2 GPUs, the run asks for 1"
    ]


@pytest.mark.parametrize(
    ("setting", "place"),
    [
        ("title=x", "title"), ("name=Rayk", "name"), ("backoffLimit=-1", "backoffLimit"), ("storage.size=big", "size"),
        ("storage.accessModes[0]=Any", "accessModes"), ("trainer.gpus=2", "gpus"), ("output=runs/x", "output"),
        ("image.registry=example.com/", "registry"),
    ],
)  # fmt: skip
def test_schema_refuses_other_values(setting, place):
    refused = tools.run("helm", "template", "release", DEPLOY, "--set", setting, check=False)
    assert refused.returncode != 0
    assert place in refused.stderr


def test_lint_passes_and_versions_agree():
    assert "0 chart(s) failed" in tools.run("helm", "lint", DEPLOY).stdout
    chart = yaml.safe_load((DEPLOY / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (rayk.__version__, rayk.__version__)


def test_package_contains_the_base(tmp_path):
    tools.run("helm", "package", DEPLOY, "--destination", tmp_path)
    (package,) = tmp_path.glob("*.tgz")
    rendered = tools.run("helm", "template", "release", package).stdout
    assert rendered == tools.run("helm", "template", "release", DEPLOY).stdout
