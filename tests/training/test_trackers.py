"""Curves in Weights & Biases (offline) and MLflow (a folder), with the real packages: they go on after a resume."""

import json
import logging
import struct
from pathlib import Path

import mlflow
import pytest
import yaml
from wandb.proto import wandb_internal_pb2

from rayk.config import TrackingConfig, parse_config
from rayk.errors import InputError
from rayk.methods import METHODS, Supervised
from rayk.run import distill
from rayk.training.recorder import Recorder
from rayk.training.trackers import check_trackers
from tests.runs import curve, failing_once, settings

_WANDB_BLOCK, _WANDB_HEADER = 32 * 1024, 7


@pytest.fixture
def mlflow_uri(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return f"file://{tmp_path}/mlflow"


def mlflow_runs(uri: str) -> list[mlflow.entities.Run]:
    client = mlflow.MlflowClient(uri)
    return client.search_runs([client.get_experiment_by_name("rayk").experiment_id])


def mlflow_curve(uri: str, run: mlflow.entities.Run, name: str) -> dict[int, float]:
    history = mlflow.MlflowClient(uri).get_metric_history(run.info.run_id, name)
    return {metric.step: metric.value for metric in history}


def wandb_records(folder: Path) -> list[wandb_internal_pb2.Record]:
    """Read the offline files of a run, in the order in which they were written: LevelDB logs of protobuf messages."""
    records = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        content, at, message = path.read_bytes(), _WANDB_HEADER, b""
        while at < len(content):
            if _WANDB_BLOCK - at % _WANDB_BLOCK < _WANDB_HEADER:
                at += _WANDB_BLOCK - at % _WANDB_BLOCK
                continue
            _, length, kind = struct.unpack("<IHB", content[at : at + _WANDB_HEADER])
            message += content[at + _WANDB_HEADER : at + _WANDB_HEADER + length]
            at += _WANDB_HEADER + length
            if kind in (1, 4):  # a whole message, or the last part of one
                records.append(wandb_internal_pb2.Record.FromString(message))
                message = b""
    return records


def wandb_curve(records: list[wandb_internal_pb2.Record], name: str) -> dict[int, float]:
    rows = [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for record in records if record.HasField("history")]  # fmt: skip
    return {row["_step"]: row[name] for row in rows if name in row}


@pytest.mark.slow
def test_a_resumed_run_continues_its_curves(tmp_path, mlflow_uri):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"name": "first", "teachers": [{"model": "large"}]}))
    tracking = TrackingConfig(
        tensorboard=False, wandb={"mode": "offline", "tags": ["one"]}, mlflow={"tracking_uri": mlflow_uri}
    )
    first = Recorder(tmp_path, 0, tracking)
    for step in (1, 2, 3):
        first.record({"step": step, "loss": 1 / step, "started_at": 1e9, "stage": "text"})
    first.close()
    [run] = mlflow_runs(mlflow_uri)
    assert run.info.status == "FAILED"

    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"name": "first", "teachers": [{"model": "moved"}]}))
    second = Recorder(tmp_path, 2, tracking)
    for step in (3, 4):
        second.record({"step": step, "loss": 1 / step})
    second.add_to_last({"evaluation_loss": 7.0})
    second.close(completed=True)

    losses = {step: 1 / step for step in (1, 2, 3, 4)}
    [run] = mlflow_runs(mlflow_uri)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "first")
    assert run.data.params == {"name": "first", "teachers.0.model": "large"}
    assert mlflow_curve(mlflow_uri, run, "loss") == losses
    assert mlflow_curve(mlflow_uri, run, "evaluation_loss") == {4: 7.0}
    assert set(run.data.metrics) == {"loss", "evaluation_loss"}

    records = wandb_records(tmp_path)
    runs = [record.run for record in records if record.HasField("run")]
    assert {(run.run_id, run.display_name, run.project, *run.tags) for run in runs} == {
        (json.loads((tmp_path / "tracking.json").read_text())["wandb"], "first", "rayk", "one")
    }
    assert wandb_curve(records, "loss") == losses
    assert wandb_curve(records, "evaluation_loss") == {4: 7.0}


def test_a_service_that_fails_is_left_out(tmp_path, mlflow_uri, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracking = TrackingConfig(tensorboard=True, mlflow={"tracking_uri": "http://user:hunter2@127.0.0.1:9"})
    with caplog.at_level(logging.WARNING):
        recorder = Recorder(tmp_path, 0, tracking)
        recorder.record({"step": 1, "loss": 1.0})
        recorder.close(completed=True)
    assert [record.message[:40] for record in caplog.records if record.name == "rayk.training.trackers"] == [
        "tracking.mlflow is left out from now on:"
    ]
    assert "hunter2" not in caplog.text
    assert curve(tmp_path) == [1.0]
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_named_before_a_run(monkeypatch, name):
    check_trackers(TrackingConfig(**{name: {}}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_trackers(TrackingConfig())
    with pytest.raises(InputError, match=rf"tracking.{name} needs the package {name}: pip install 'rayk\[tracking\]'"):
        check_trackers(TrackingConfig(**{name: {}}))


@pytest.mark.cluster
def test_a_run_sends_its_curves(tmp_path, tiny_student, ray_cluster, mlflow_uri, monkeypatch):
    """And continues them after a resume; a secret in the settings is masked."""
    values = settings(tmp_path, tiny_student, workers=0, steps=4, checkpoint_every_steps=1)
    uri = mlflow_uri.replace("file://", "file://user:hunter2@")
    values |= {
        "tracking": {"mlflow": {"tracking_uri": mlflow_uri, "tags": {"where": uri}}, "wandb": {"mode": "offline"}}
    }
    monkeypatch.setitem(METHODS, "supervised", failing_once(Supervised, at=3))
    with pytest.raises(KeyboardInterrupt):
        distill(parse_config(values))
    distill(parse_config(values), resume=True)
    [run] = mlflow_runs(mlflow_uri)
    losses = dict(enumerate(curve(tmp_path / "run"), start=1))
    assert len(losses) == 4
    assert mlflow_curve(mlflow_uri, run, "loss") == pytest.approx(losses)
    assert wandb_curve(wandb_records(tmp_path / "run"), "loss") == pytest.approx(losses)
    assert "hunter2" not in str(run.data.params)
    assert run.info.status == "FINISHED"
