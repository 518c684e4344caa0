"""At most one process works in a folder; one that was killed loses its lease, also to another machine."""

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from rayk.errors import InputError, Overtaken
from rayk.storage import lease
from rayk.storage.lease import hold_lease
from tests.runs import environment, wait_until

HOLD = """
import sys, time
from pathlib import Path
from rayk.storage.lease import hold_lease
with hold_lease(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lease on `tmp_path`/run."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def elsewhere(monkeypatch):
    """This process is on another machine than those that it starts: it sees only whether they touch their files."""
    monkeypatch.setattr(lease, "_machine", lambda: "another machine")
    monkeypatch.setattr(lease, "SILENCE_SECONDS", 5.0)
    monkeypatch.setattr(lease, "_POLL_SECONDS", 0.1)


def files(folder):
    return sorted(path.name for path in (folder / "lease").iterdir())


def test_a_living_process_keeps_its_lease_until_it_is_killed(tmp_path, holder):
    refusal = rf"The run in '{tmp_path / 'run'}' belongs to process {holder.pid} on .*, which is still running"
    with pytest.raises(InputError, match=refusal), hold_lease(tmp_path / "run"):
        pass
    holder.kill()
    wait_until(lambda: holder.poll() is not None)
    with hold_lease(tmp_path / "run") as taken:
        assert (taken.number, files(tmp_path / "run")) == (2, ["000002.json"])


@pytest.mark.slow
def test_a_process_on_another_machine_keeps_its_lease_while_it_shows_life(tmp_path, holder, elsewhere):
    said = []
    with pytest.raises(InputError, match="which is still running"), hold_lease(tmp_path / "run", said.append):
        pass
    assert said == [
        f"Waiting up to 5 s to see whether process {holder.pid} on {lease.socket.gethostname()} still works in the run "
        "directory"
    ]
    holder.kill()
    with hold_lease(tmp_path / "run") as taken:
        assert taken.number == 2


def test_a_process_whose_lease_was_taken_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "TOUCH_SECONDS", 0.05)
    with hold_lease(tmp_path) as mine:
        mine.check()
        (tmp_path / "lease" / "000002.json").write_text("{}")  # what another machine does after a long silence
        wait_until(lambda: not mine._thread.is_alive())
        with pytest.raises(Overtaken, match="Another process has continued the run"):
            mine.check()


def test_of_processes_that_start_at_once_one_gets_the_lease(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "TOUCH_SECONDS", 0.05)  # one that finds the file empty waits for a touch
    monkeypatch.setattr(lease, "_POLL_SECONDS", 0.05)
    dead = {"host": "here", "machine": lease._machine(), "pid": 1, "started": "never"}
    together = threading.Barrier(8)

    def start(_):
        together.wait()
        try:
            with hold_lease(tmp_path):
                together.wait()
                return True
        except InputError:
            together.wait()
            return False

    for _ in range(20):
        (tmp_path / "lease").mkdir()
        (tmp_path / "lease" / "000007.json").write_text(json.dumps(dead))
        with ThreadPoolExecutor(8) as threads:
            assert sum(threads.map(start, range(8))) == 1
        (tmp_path / "lease").rmdir()  # it is empty


def test_a_released_lease_leaves_nothing(tmp_path):
    with hold_lease(tmp_path / "runs" / "first"):
        assert files(tmp_path / "runs" / "first") == ["000001.json"]
    assert not (tmp_path / "runs").exists()


def test_the_next_process_has_the_next_number(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    for number in (1, 2, 3):
        with hold_lease(tmp_path) as held:
            assert held.number == number
        assert files(tmp_path) == [f"00000{number}.ended"]
