"""`metrics.jsonl` contains each step of the surviving history once, and can be followed while it grows."""

import json
import resource

import pytest

from rayk.config import TrackingConfig
from rayk.errors import Overtaken, RunFailed
from rayk.report.run_directory import MetricsFollower, read_lines
from rayk.training.recorder import Recorder

QUIET = TrackingConfig(tensorboard=False)


def steps(rows):
    return [row["step"] for row in rows]


def test_recorder_opened_at_a_checkpoint_removes_later_steps(tmp_path):
    first = Recorder(tmp_path, 0, QUIET)
    for step in range(1, 6):
        first.record({"step": step, "loss": 1.0})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # the process was killed here
    second = Recorder(tmp_path, 3, QUIET)
    assert steps(read_lines(tmp_path / "metrics.jsonl")) == [1, 2, 3]
    second.record({"step": 4, "loss": 2.0})
    second.close()
    assert [row["loss"] for row in read_lines(tmp_path / "metrics.jsonl")] == [1.0, 1.0, 1.0, 2.0]


def test_follower_returns_each_row_once_and_starts_again_after_a_cut(tmp_path):
    follower = MetricsFollower(tmp_path / "metrics.jsonl")
    assert follower.new_rows() == []
    recorder = Recorder(tmp_path, 0, QUIET)
    assert follower.new_rows() == []
    for step in (1, 2, 3):
        recorder.record({"step": step})
        assert steps(follower.new_rows()) == [step]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4})[:5])
        file.flush()
        assert follower.new_rows() == []
    recorder.close()
    recorder = Recorder(tmp_path, 2, QUIET)
    recorder.record({"step": 3})
    assert steps(follower.new_rows()) == [1, 2, 3]
    assert follower.new_rows() == []
    recorder.close()


def test_recorder_of_an_overtaken_attempt_changes_no_row_of_the_newer_one(tmp_path):
    older = Recorder(tmp_path, 0, QUIET)
    for step in (1, 2, 3):
        older.record({"step": step, "attempt": 1})
    newer = Recorder(tmp_path, 2, QUIET)
    newer.record({"step": 3, "attempt": 2})
    older.record({"step": 4, "attempt": 1})
    older.add_to_last({"evaluation_loss": 1.0})
    for problem in (older.check, older.sync):
        with pytest.raises(Overtaken, match="another process has continued this run"):
            problem()
    newer.record({"step": 4, "attempt": 2})
    newer.sync()
    assert [row["attempt"] for row in read_lines(tmp_path / "metrics.jsonl")] == [1, 1, 2, 2]
    older.close()
    newer.close()


def test_recorder_writes_no_row_after_one_that_a_full_disk_has_refused(tmp_path):
    recorder = Recorder(tmp_path, 0, QUIET)
    recorder.record({"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
    try:
        recorder.record({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    recorder.record({"step": 3})
    with pytest.raises(RunFailed, match="There is no space left in"):
        recorder.sync()
    recorder.close()
    assert steps(read_lines(tmp_path / "metrics.jsonl")) in ([1], [1, 2])
    Recorder(tmp_path, 1, QUIET).close()
    assert steps(read_lines(tmp_path / "metrics.jsonl")) == [1]
