"""Secrets in a teacher's settings are in no file of a run directory and in no log, Ray's included."""

import json
import logging
from pathlib import Path

import pytest
import ray

from rayk.config import parse_config
from rayk.run import distill
from tests.runs import settings
from tests.synthesis.helpers import engine_of


@pytest.mark.long
def test_planted_secrets_are_in_no_file_and_no_log(tmp_path, tiny_student, endpoint, ray_cluster, caplog):
    caplog.set_level(logging.DEBUG)
    engine = engine_of(endpoint) | {
        "extra_body": {"api_key": "sk-PlantedKey", "headers": {"Authorization": "PlantedToo"}}
    }
    teacher = {"name": "keyed", "model": "parrot-1", "engine": engine, "resources": {"num_cpus": 0.25}}
    values = settings(tmp_path, tiny_student)
    rows = tmp_path / "questions.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n} + {n} ="}) + "\n" for n in range(8)))
    values |= {"teachers": [teacher], "data": {"train": {"path": str(rows)}}, "synthesis": {"kind": "responses"}}
    values["training"] |= {"workers": 1, "steps": 1}
    result = distill(parse_config(values))
    assert endpoint.requests[-1].body["api_key"] == "sk-PlantedKey"
    logs = Path(ray._private.worker._global_node.get_session_dir_path(), "logs")
    files = [path for folder in (result.output, logs) for path in folder.rglob("*") if path.is_file()]
    assert {"config.yaml", "summary.json", "report.html", "rows.parquet"} <= {path.name for path in files}
    assert not [path for path in files if b"Planted" in path.read_bytes()]
    assert "Planted" not in caplog.text
    asked = len(endpoint.requests)
    (result.output / "summary.json").unlink()
    engine["extra_body"]["api_key"] = "sk-NewPlantedKey"  # a key may change
    distill(parse_config(values), resume=True)
    assert len(endpoint.requests) == asked
