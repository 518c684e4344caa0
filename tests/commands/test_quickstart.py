"""`rayk quickstart` with a teacher and students that train for a few steps only."""

import json

import pytest

from rayk.commands import quickstart
from rayk.data import quickstart_task
from rayk.run import ProgressListener

pytestmark = pytest.mark.cluster


class Recording(ProgressListener):
    def __init__(self):
        self.stages = []

    def stage(self, text):
        self.stages.append(text)


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = quickstart_task.TEACHER_TRAINING | {"rows": 256, "steps": 4, "batch_size": 64}
    monkeypatch.setattr(quickstart_task, "TEACHER_TRAINING", settings)
    monkeypatch.setattr(quickstart, "_EVALUATION_ROWS", 16)


@pytest.mark.long
def test_quickstart_compares_two_students_of_one_served_teacher(small, ray_cluster, tmp_path):
    listener = Recording()
    compared = quickstart.run_quickstart(tmp_path / "out", listener, steps=6)
    assert [summary["method"] for summary in compared.summaries] == ["supervised", "logit_kd"]
    for summary in compared.summaries:
        assert summary["steps"] == 6
        assert {"accuracy", "loss", "forward_kl", "agreement"} <= summary["student"].keys()
        assert {"accuracy", "loss"} <= summary["teacher"].keys()
    # Equal steps on equal data from equal weights: before the first update both students are one model.
    first = [
        (tmp_path / "out" / name / "metrics.jsonl").read_text().splitlines()[0] for name in ("supervised", "logit_kd")
    ]
    assert json.loads(first[0])["cross_entropy"] == pytest.approx(json.loads(first[1])["cross_entropy"], rel=1e-5)
    page = compared.report.read_text()
    assert "supervised" in page
    assert "logit_kd" in page
    assert any(stage.startswith("Training the teacher") for stage in listener.stages)

    # The second time the teacher comes from the cache, and the earlier runs give way.
    again = Recording()
    model = quickstart.teacher_model(quickstart.task_folder(), again)
    assert (model / "config.json").exists()
    assert not any(stage.startswith("Training") for stage in again.stages)


def test_quickstart_does_not_remove_other_folders(tmp_path):
    folder = tmp_path / "out" / "supervised"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("my life's work")
    with pytest.raises(quickstart.InputError, match="is no run of an earlier quickstart"):
        quickstart.run_quickstart(tmp_path / "out", ProgressListener())
    assert (folder / "thesis.tex").exists()
