"""Every build of `deploy/` is accepted by KubeRay's schemas and rules, and its pods give the run what it asks for."""

import copy
import json
import runpy
import shlex
import shutil

import pytest
import typer.main
import yaml
from ray.serve.schema import ServeDeploySchema

from rayk.cli import app
from rayk.commands.doctor import examine
from rayk.config import load_config
from rayk.teachers.deployment import build_application
from tests.deploy.manifests import (
    BUILDS,
    COMPONENTS,
    DEPLOY,
    REPOSITORY,
    by_name,
    cluster_spec,
    entrypoints,
    groups,
    kustomize,
    of_kind,
    run_config,
    with_components,
)
from tests.deploy.operator_rules import problems
from tests.deploy.pod_rules import pod_problems, resource_problems

CONVERSIONS = ["cluster", "service"]
"""Components that replace the RayJob, so that they come last."""
NO_RAY_CLUSTER = [DEPLOY / "base" / "train"]
CONFIG_MOUNT, VOLUME = "/etc/rayk/", "/mnt/rayk/"


def all_problems(objects):
    found = [problem for item in objects for problem in problems(item)]
    for item in objects:
        if (cluster := cluster_spec(item)) is not None and not found:
            found += pod_problems(cluster)
            config = run_config(objects)
            assert config is not None
            found += resource_problems(cluster, config)
    return found


def job():
    return copy.deepcopy(kustomize(DEPLOY / "base" / "job"))


def ray_job(objects):
    return by_name(objects)["RayJob", "rayk"]


@pytest.mark.parametrize("folder", BUILDS, ids=lambda folder: f"{folder.parent.name}/{folder.name}")
def test_build_is_accepted(folder):
    objects = kustomize(folder)
    assert all_problems(objects) == []
    assert any(cluster_spec(item) for item in objects) or folder in NO_RAY_CLUSTER


@pytest.fixture
def overlay():
    """A folder in `deploy/overlays`, since a kustomization reads only relative paths."""
    folder = DEPLOY / "overlays" / "_test"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def test_components_work_together(overlay):
    """All at once, but Kueue with autoscaling, of two schedulers one, and one conversion."""
    left_out = {"autoscaling", "volcano", *CONVERSIONS}
    together = [component for component in COMPONENTS if component.name not in left_out | {"token-authentication"}]
    assert all_problems(with_components(together, overlay)) == []
    long_lived = {"autoscaling", "gcs-fault-tolerance", "pvc", "s3", "service-account"}
    for conversion in CONVERSIONS:
        first = [component for component in COMPONENTS if component.name in long_lived]
        objects = with_components([*first, DEPLOY / "components" / conversion], overlay)
        (item,) = of_kind(objects, "RayCluster", "RayService")
        spec = cluster_spec(item)
        assert all_problems(objects) == []
        assert spec["gcsFaultToleranceOptions"]["redisAddress"] == "redis:6379"
        assert spec["enableInTreeAutoscaling"]
        assert "rayk" not in [o["metadata"]["name"] for o in of_kind(objects, "RayJob")]


BREAKS = {
    "misspelled field": (lambda o: ray_job(o)["spec"].update(backofLimit=1), "backofLimit"),
    "wrong type": (lambda o: ray_job(o)["spec"].update(backoffLimit="six"), "'six' is not of type 'integer'"),
    "container without a name": (lambda o: trainer(o)["containers"][0].pop("name"), "'name' is a required property"),
    "long name": (lambda o: ray_job(o)["metadata"].update(name="r" * 48), "longer than 47"),
    "capital letters": (lambda o: ray_job(o)["metadata"].update(name="Rayk"), "does not match"),
    "dot in the name": (lambda o: ray_job(o)["metadata"].update(name="rayk.x"), "no DNS label"),
    "no cluster": (lambda o: ray_job(o)["spec"].pop("rayClusterSpec"), "needs either"),
    "both kinds of retries": (
        lambda o: ray_job(o)["spec"].update(clusterSelector={"ray.io/cluster": "rayk"}), "backoffLimit is incompatible"
    ),
    "interactive with retries": (lambda o: ray_job(o)["spec"].update(submissionMode="InteractiveMode"), "backoffLimit"),
    "deletion twice": (
        lambda o: ray_job(o)["spec"].update(
            deletionStrategy={"deletionRules": [{"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED"}}]}
        ),
        "deletionRules excludes",
    ),
    "time to live without shutdown": (lambda o: ray_job(o)["spec"].update(shutdownAfterJobFinishes=False), "needs sh"),
    "upgrade strategy": (
        lambda o: ray_job(o)["spec"]["rayClusterSpec"].update(upgradeStrategy={"type": "Recreate"}), "upgradeStrategy"
    ),
    "submitter settings": (lambda o: ray_job(o)["spec"].update(submitterConfig={"backoffLimit": 2}), "SidecarMode has"),
    "restarted head": (lambda o: head(o).update(restartPolicy="Always"), "SidecarMode needs"),
    "resources twice": (
        lambda o: ray_job(o)["spec"]["rayClusterSpec"]["headGroupSpec"].update(resources={"CPU": "4"}), "rayStartParams"
    ),
    "invalid label": (lambda o: trainer_group(o).update(labels={"rayk/": "trainer"}), "is no label"),
    "old Ray with tokens": (lambda o: ray_job(o)["spec"]["rayClusterSpec"].update(rayVersion="2.51.0"), "2.52"),
    "autoscaler with restarts": (
        lambda o: (
            ray_job(o)["spec"]["rayClusterSpec"].update(
                enableInTreeAutoscaling=True, autoscalerOptions={"version": "v2"}
            ),
            trainer(o).update(restartPolicy="OnFailure"),
        ),
        "restartPolicy must be Never",
    ),
    "Redis in a variable": (
        lambda o: head(o)["containers"][0]["env"].append({"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"}), "REDIS"
    ),
    "Kueue without shutdown": (
        lambda o: (
            ray_job(o)["metadata"]["labels"].update({"kueue.x-k8s.io/queue-name": "rayk"}),
            ray_job(o)["spec"].update(shutdownAfterJobFinishes=False, ttlSecondsAfterFinished=0),
        ),
        "Kueue needs",
    ),
    "working head": (
        lambda o: ray_job(o)["spec"]["rayClusterSpec"]["headGroupSpec"].pop("rayStartParams"), "the head accepts work"
    ),
    "root": (lambda o: trainer(o).pop("securityContext"), "trainer: the pod may run as root"),
    "privileges": (lambda o: trainer(o)["containers"][0].pop("securityContext"), "ray-worker keeps privileges"),
    "disk as shared memory": (
        lambda o: next(v for v in trainer(o)["volumes"] if v["name"] == "shared-memory").update(emptyDir={}), "/dev/shm"
    ),
    "unknown image": (lambda o: trainer(o)["containers"][0].update(image="rayk-student:0.1.0"), "not built here"),
    "old image": (lambda o: trainer(o)["containers"][0].update(image="rayk-trainer:0.0.9"), "not built here"),
    "no toleration": (lambda o: trainer(o).pop("tolerations"), "not tolerated"),
    "GPU limit": (
        lambda o: trainer(o)["containers"][0]["resources"]["limits"].update({"nvidia.com/gpu": "2"}), "GPUs differ"
    ),
    "no stop time": (lambda o: trainer(o).pop("terminationGracePeriodSeconds"), "no stop time"),
    "other label than the run's": (lambda o: trainer_group(o).update(labels={"rayk/group": "students"}), "choose 0"),
    "more pods than the run asks for": (lambda o: trainer_group(o).update(replicas=2, maxReplicas=2), "asks for 1"),
    "larger run": (lambda o: change_run(o, workers=2), "2 times 4 CPUs and 1 GPUs do not fit"),
    "GPUs left open": (
        lambda o: change_run(o, resources={"num_cpus": 4, "labels": {"rayk/group": "trainer"}}), "num_gpus is not set"
    ),
}  # fmt: skip


def head(objects):
    return next(groups(ray_job(objects)["spec"]["rayClusterSpec"])).pod


def trainer_group(objects):
    return ray_job(objects)["spec"]["rayClusterSpec"]["workerGroupSpecs"][1]


def trainer(objects):
    return trainer_group(objects)["template"]["spec"]


def change_run(objects, **training):
    (item,) = of_kind(objects, "ConfigMap")
    run = yaml.safe_load(item["data"]["run.yaml"])
    run["training"] |= training
    item["data"]["run.yaml"] = yaml.safe_dump(run)


@pytest.mark.parametrize("name", BREAKS)
def test_broken_job_is_refused(name):
    objects = job()
    change, expected = BREAKS[name]
    change(objects)
    found = all_problems(objects)
    assert any(expected in problem for problem in found), found


@pytest.mark.parametrize("folder", BUILDS, ids=lambda folder: f"{folder.parent.name}/{folder.name}")
def test_commands_are_rayks_and_runs_resume(folder):
    objects = kustomize(folder)
    command_line = typer.main.get_command(app)
    for entrypoint in entrypoints(objects):
        program, name, *arguments = shlex.split(entrypoint)
        assert program == "rayk"
        context = command_line.commands[name].make_context(name, arguments)  # raises on an unknown option
        assert context.params["config"].startswith(CONFIG_MOUNT)
        if name == "run":
            assert context.params["resume"]
            assert context.params["output"].startswith(VOLUME + "runs/")
        else:
            assert name == "serve"


@pytest.mark.parametrize("folder", BUILDS, ids=lambda folder: f"{folder.parent.name}/{folder.name}")
def test_mounted_files_and_volumes_exist(folder):
    """Paths under /etc/rayk are keys of the ConfigMap; the run reads and writes only the volume."""
    objects = kustomize(folder)
    if folder in NO_RAY_CLUSTER:
        (entrypoint,) = entrypoints(objects)
        assert f" {CONFIG_MOUNT}run.yaml " in entrypoint
        return
    (config_map,) = of_kind(objects, "ConfigMap")
    text = json.dumps([item for item in objects if item is not config_map])
    named = {part.split("/etc/rayk/")[1] for part in text.replace('"', " ").split() if CONFIG_MOUNT in part}
    assert named <= config_map["data"].keys()
    for item in objects:
        for group in groups(cluster_spec(item)) if cluster_spec(item) else []:
            volumes = {volume["name"]: volume for volume in group.pod["volumes"]}
            mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in group.container["volumeMounts"]}
            assert mounts["/etc/rayk"]["configMap"]["name"] == config_map["metadata"]["name"]
            assert mounts["/mnt/rayk"]["persistentVolumeClaim"]["claimName"] == "rayk"
    config = run_config(objects)
    local = [config.data.train.path, *(teacher.model for teacher in config.teachers)]
    assert all(path.startswith(VOLUME) for path in local if path.startswith("/"))


def test_every_config_loads():
    configs = sorted(DEPLOY.rglob("run.yaml"))
    configs = [path for path in configs if "templates" not in path.parts]
    assert len(configs) >= 6
    for path in configs:
        assert load_config(str(path)).teachers


def test_doctor_accepts_the_smoke_run(tmp_path):
    """Its models and rows, which the head's init container makes, fit together."""
    folder = DEPLOY / "overlays" / "kind"
    prepare = runpy.run_path(str(folder / "prepare.py"))["prepare"]
    for _ in range(2):  # every attempt does it
        prepare(tmp_path / "smoke")
    config = tmp_path / "run.yaml"
    config.write_text((folder / "run.yaml").read_text().replace("/mnt/rayk", str(tmp_path)))
    checks = list(examine(str(config), [f"output={tmp_path / 'run'}"]))
    assert len(checks) > 8
    assert [check.text for check in checks if check.state == "wrong"] == []


def test_served_application_is_a_teacher():
    """The RayService's `serveConfigV2` is valid, and rayk builds its application from the arguments."""
    (service,) = of_kind(kustomize(DEPLOY / "base" / "service"), "RayService")
    text = service["spec"]["serveConfigV2"]
    (application,) = ServeDeploySchema(**yaml.safe_load(text)).applications
    assert application.import_path == f"{build_application.__module__}:{build_application.__name__}"
    built = build_application(application.args)
    options = built._bound_deployment.ray_actor_options
    assert options["label_selector"] == {"rayk/group": "teacher"}
    assert options["num_gpus"] == 1
    config = run_config(kustomize(DEPLOY / "base" / "job"))
    assert application.args["model"] == config.teachers[0].model
    assert application.name == config.teachers[0].name


def test_long_lived_cluster_is_that_of_the_job():
    one_run = ray_job(job())["spec"]["rayClusterSpec"]
    objects = by_name(kustomize(DEPLOY / "base" / "cluster"))
    assert objects["RayCluster", "rayk"]["spec"] == one_run
    assert by_name(kustomize(DEPLOY / "base" / "service"))["RayService", "rayk"]["spec"]["rayClusterConfig"] == one_run
    train = by_name(kustomize(DEPLOY / "base" / "train"))["RayJob", "rayk-train"]
    for item in (objects["RayJob", "rayk-serve"], train):
        assert item["spec"]["clusterSelector"] == {"ray.io/cluster": "rayk"}


def test_autoscaling_starts_from_zero():
    cluster = ray_job(kustomize(DEPLOY / "overlays" / "autoscaling"))["spec"]["rayClusterSpec"]
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert {(g["replicas"], g["minReplicas"], g["maxReplicas"]) for g in cluster["workerGroupSpecs"]} == {(0, 0, 1)}


def test_there_is_no_secret():
    for path in sorted(DEPLOY.rglob("*")):
        if not path.is_file() or path.name == "constraints-gpu.txt":
            continue
        text = path.read_text()
        assert "kind: Secret" not in text, path
        for mark in ("AKIA", "hf_", "sk-", "BEGIN ", 'password: "', 'token: "'):
            assert mark not in text, f"{path.relative_to(REPOSITORY)} contains {mark}"


def test_all_folders_are_described():
    page = (DEPLOY / "README.md").read_text()
    for folder in [*COMPONENTS, *BUILDS]:
        assert f"`{folder.name}`" in page or f"{folder.parent.name}/{folder.name}" in page, folder
