"""What Ray Train reports reaches the user as a sentence."""

import pytest
from ray.train import WorkerGroupError

from rayk.training.trainer import _cause, _interruptible

TRACEBACK = """Traceback (most recent call last):
  File "loop.py", line 1, in train_worker
RuntimeError: out of memory

"""


def test_a_failure_is_told_by_its_last_line():
    report = WorkerGroupError(f"[Rank 0 Error Snippet]:\n{TRACEBACK}\n[Rank 1]: …", {0: RuntimeError(TRACEBACK)})
    assert _cause(report) == "RuntimeError: out of memory"
    assert _cause(WorkerGroupError("No worker came up.", {})) == "No worker came up."


def test_ray_trains_exit_on_ctrl_c_is_ctrl_c_to_the_caller():
    with pytest.raises(KeyboardInterrupt), _interruptible():
        raise SystemExit(0)
