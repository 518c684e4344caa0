"""A run whose checkpoints and model are in a bucket: killed, resumed, exported, and without its secrets in any file."""

import logging
import os
import shutil
import signal
from pathlib import Path

import pytest
import yaml

from rayk.commands.doctor import examine
from rayk.config import parse_config
from rayk.config.secrets import hide
from rayk.errors import InputError, RunFailed
from rayk.report.report import write_report
from rayk.run import distill, export_model
from rayk.run.directory import check_directory
from tests.runs import assert_same_learning, metrics, rayk, settings, wait_until
from tests.s3 import PASSWORD, USER, Link

SECRETS = (PASSWORD, PASSWORD.replace("/", "%2F").replace("+", "%2B"), USER, "hf_PlantedToken")
LONG = {"steps": 60, "batch_size": 16, "checkpoint_every_steps": 10, "learning_rate": 1e-3}


def in_bucket(folder: Path, student: str, s3, **training):
    """Settings of a run with its checkpoints and model in the bucket, and with secrets among its settings."""
    values = settings(folder, student, **LONG | {"checkpoints": s3.uri(f"{folder.name}/checkpoints")} | training)
    values["student"] |= {"save_to": s3.uri(f"{folder.name}/model"), "lora": {"r": 2}}
    values["evaluation"] = {"before_training": False}
    options = {"hf_token": "hf_PlantedToken", "env": [{"HF_TOKEN": "hf_PlantedToken"}]}
    values["method"] = {"kind": "custom", "path": "rayk.methods:Supervised", "support": None, "options": options}
    return values


def assert_no_secrets(*files: Path) -> None:
    for file in files:
        content = file.read_bytes()
        for secret in SECRETS:
            assert secret.encode() not in content, f"{file} contains {secret}"


@pytest.mark.cluster  # a process that trains
@pytest.mark.long
def test_killed_run_continues_from_the_bucket_and_leaves_no_secrets(tmp_path, tiny_student, s3, caplog):
    (tmp_path / "whole").mkdir()
    undisturbed = settings(tmp_path / "whole", tiny_student, **LONG)
    undisturbed["student"] |= {"lora": {"r": 2}}
    distill(parse_config(undisturbed))
    folder = tmp_path / "killed"
    folder.mkdir()
    values = in_bucket(folder, tiny_student, s3)
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    run = folder / "run"
    with rayk("run", folder / "run.yaml", log=tmp_path / "first.log") as process:
        wait_until(lambda: len(metrics(run)) >= 25, "step 25", process)
        os.killpg(process.pid, signal.SIGKILL)
    assert len(metrics(run)) < 60
    caplog.set_level(logging.DEBUG)
    distill(parse_config(values), resume=True)
    assert not any(secret in caplog.text for secret in SECRETS)
    assert_same_learning(tmp_path / "whole" / "run", run, 1e-6)

    for name in ("model", "adapter"):
        copied = "killed/model" + "-adapter" * (name == "adapter")
        local = {path.name: path.read_bytes() for path in (run / name).iterdir()}
        assert {file: s3.read(f"{copied}/{file}") for file in s3.names(copied)} == local
    assert not (run / "checkpoints").exists()
    write_report([run], run / "report.html")
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {"config.yaml", "summary.json", "report.html", "metrics.jsonl"} <= {path.name for path in files}
    assert_no_secrets(*files, tmp_path / "first.log")
    assert "s3://***@bucket/killed/checkpoints" in (run / "config.yaml").read_text()


@pytest.fixture
def finished(tmp_path, tiny_student, s3, monkeypatch):
    """The directory of a short run whose checkpoints are in the bucket."""
    values = in_bucket(tmp_path, tiny_student, s3, steps=2)
    values["student"]["save_to"] = None
    result = distill(parse_config(values))
    # `config.yaml` contains no credentials, so the environment gives them.
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", USER)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PASSWORD)
    return result.output


def test_export_reads_from_and_writes_to_a_bucket(finished, s3):
    name = finished.parent.name
    written = export_model(finished, s3.uri(f"{name}/exported"))
    assert written.model.startswith("s3://***@bucket/") and written.step == 2
    local = {path.name: path.read_bytes() for path in (finished / "model").iterdir()}
    assert {file: s3.read(f"{name}/exported/{file}") for file in s3.names(f"{name}/exported")} == local
    assert s3.names(f"{name}/exported-adapter")
    with pytest.raises(InputError, match="exists already; give another --output"):
        export_model(finished, s3.uri(f"{name}/exported"))
    with pytest.raises(RunFailed, match=r"cannot be written to 's3://\*\*\*@no-such-bucket/x"):
        export_model(finished, s3.uri("x").replace("@bucket", "@no-such-bucket"))


@pytest.mark.cluster  # a process that trains
@pytest.mark.long
def test_storage_that_stands_still_delays_only_the_next_checkpoint(tmp_path, tiny_student, s3):
    long = {"steps": 180, "checkpoint_every_steps": 60, "learning_rate": 1e-3, "keep_checkpoints": 9}
    for name in ("whole", "slow"):
        (tmp_path / name).mkdir()
    distill(parse_config(settings(tmp_path / "whole", tiny_student, **long)))
    link, run = Link(s3.host), tmp_path / "slow" / "run"
    place = s3.uri("slow/checkpoints").replace(s3.host, link.host)
    values = settings(tmp_path / "slow", tiny_student, **long, checkpoints=place)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    with rayk("run", tmp_path / "run.yaml", log=tmp_path / "log") as process:
        wait_until(lambda: metrics(run), "the first step", process)
        link.flows.clear()
        assert len(metrics(run)) < 60
        wait_until(lambda: len(metrics(run)) >= 120, "the step of the second checkpoint", process)
        assert not any("manifest" in name for name in s3.names("slow/checkpoints"))
        link.flows.set()
        wait_until(lambda: process.poll() is not None, "the end of the run")
    link.close()
    assert process.returncode == 0
    assert_same_learning(tmp_path / "whole" / "run", run, 1e-6)
    assert sum("manifest" in name for name in s3.names("slow/checkpoints")) == 3


@pytest.mark.slow
def test_run_continues_from_the_bucket_where_its_directory_is_lost(tmp_path, tiny_student, s3):
    values = in_bucket(tmp_path, tiny_student, s3, steps=2)
    first = distill(parse_config(values))
    model = (first.model / "model.safetensors").read_bytes()
    shutil.rmtree(first.output)
    again = distill(parse_config(values), resume=True)
    assert (again.model / "model.safetensors").read_bytes() == model
    assert metrics(again.output) == []  # no step was repeated


def test_places_are_checked_before_anything_starts(tmp_path, tiny_student, s3):
    values = in_bucket(tmp_path, tiny_student, s3)
    s3.write(f"{tmp_path.name}/model/config.json", b"of another run")
    with pytest.raises(InputError, match=r"student\.save_to 's3://\*\*\*@bucket/.*' contains files already"):
        check_directory(parse_config(values), resume=False)
    values["student"]["save_to"] = values["student"]["save_to"].replace("@bucket", "@no-such-bucket")
    values["output"] = str(tmp_path / "new")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    *_, writable, wrong = examine(str(tmp_path / "run.yaml"))
    assert (writable.state, wrong.state) == ("ok", "wrong")
    assert writable.text.startswith("training.checkpoints can be written: s3://***@bucket/")
    assert wrong.text.startswith("student.save_to 's3://***@no-such-bucket/")
    assert not any(secret in hide(check.text) for check in (writable, wrong) for secret in SECRETS)


def test_model_that_cannot_be_copied_is_kept(tmp_path, tiny_student, s3):
    values = in_bucket(tmp_path, tiny_student, s3, steps=1)
    values["student"]["save_to"] = values["student"]["save_to"].replace("@bucket", "@no-such-bucket")
    values["training"]["checkpoints"] = None
    with pytest.raises(RunFailed, match=r"/run/model' is complete, but cannot be copied to student\.save_to") as caught:
        distill(parse_config(values), resume=True)
    assert not any(secret in str(caught.value) for secret in SECRETS)
    assert (tmp_path / "run" / "model" / "config.json").exists() and (tmp_path / "run" / "summary.json").exists()


def test_run_directory_cannot_be_a_uri(tmp_path, tiny_student):
    values = settings(tmp_path, tiny_student) | {"output": "s3://bucket/run"}
    sentence = (
        "output is 's3://bucket/run', but a run directory is a folder; .* training.checkpoints and student.save_to"
    )
    with pytest.raises(InputError, match=sentence):
        parse_config(values)
    with pytest.raises(InputError, match=sentence):
        distill(parse_config(values | {"output": None}), output="s3://bucket/run")
