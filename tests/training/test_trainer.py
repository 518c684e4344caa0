"""Failures that Ray Train reports become one sentence, and the first interruption ends training gracefully."""

import os
import signal
import time

import pytest
from ray.train import WorkerGroupError

from rayk.training.interruption import StopRequest, stop_gracefully
from rayk.training.trainer import _cause, _run_in_thread

TRACEBACK = """Traceback (most recent call last):
  File "loop.py", line 1, in train_worker
RuntimeError: out of memory

"""


def test_failure_is_described_by_the_last_line_of_its_report():
    report = WorkerGroupError(f"[Rank 0 Error Snippet]:\n{TRACEBACK}\n[Rank 1]: …", {0: RuntimeError(TRACEBACK)})
    assert _cause(report) == "RuntimeError: out of memory"
    assert _cause(WorkerGroupError("No worker came up.", {})) == "No worker came up."


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_interruption_requests_a_stop_and_the_second_stops_at_once(tmp_path, number):
    def previous(*_):
        raise SystemExit(number)

    before = {each: signal.signal(each, previous) for each in (signal.SIGINT, signal.SIGTERM)}
    request, aborted, seen = StopRequest(tmp_path), [], []
    try:
        with pytest.raises(KeyboardInterrupt):
            _interrupt(number, 1, request, seen, aborted)
        assert seen == [(True, [])] and not request.exists()
        with pytest.raises(SystemExit):
            _interrupt(number, 2, request, seen, aborted)
        assert seen == [(True, [])] * 2 and aborted == [True] and not request.exists()
        assert signal.getsignal(number) is previous
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _interrupt(number, times, request, seen, aborted):
    """Interrupt a block `times` times; note after each whether it goes on, with what request and aborts."""
    with stop_gracefully(request, abort=lambda: aborted.append(True)):
        for _ in range(times):
            os.kill(os.getpid(), number)
            seen.append((request.exists(), list(aborted)))


def test_work_in_a_thread_returns_its_result_or_raises_its_error():
    assert _run_in_thread(lambda: time.sleep(0.01) or 3) == 3
    with pytest.raises(ZeroDivisionError):
        _run_in_thread(lambda: 1 / 0)
