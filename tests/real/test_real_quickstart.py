"""`rayk quickstart --model` with a real chat model, on a few of its prompts."""

import json

import pytest

from rayk.commands import quickstart_model
from rayk.errors import InputError
from rayk.run import ProgressListener

pytestmark = pytest.mark.cluster


def test_a_chat_model_teaches_its_cut(smollm2, ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(quickstart_model, "_TRAINING", quickstart_model._TRAINING | {"epochs": 10})
    output = tmp_path / "out"
    result = quickstart_model.run_model_quickstart(smollm2, output, ProgressListener(), rows=12)
    (summary,) = result.summaries
    assert summary["student"]["forward_kl"] < 0.6 * summary["student_before"]["forward_kl"]
    assert "accuracy" not in summary["student"]
    assert summary["teacher"]["rouge_l"] > 0.9
    sample = summary["samples"][0]
    assert sample["before"] and sample["teacher"] and sample["text"] != sample["before"]
    assert json.loads((output / "student" / "model" / "config.json").read_text())["num_hidden_layers"] == 10
    page = result.report.read_text()
    assert "Student before training" in page


def test_a_base_model_is_refused(gemma3, tmp_path):
    with pytest.raises(InputError, match="has no chat template; give --model a chat model"):
        quickstart_model.run_model_quickstart(gemma3, tmp_path / "out", ProgressListener())
