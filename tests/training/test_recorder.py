"""`metrics.jsonl` contains each step of the surviving history once, and can be followed while it grows."""

import json

from rayk.config import TrackingConfig
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
