"""The lease on a folder: at most one process works in it, and one that has died loses it.

    FOLDER/lease/000002.json     the second process works in it
    FOLDER/lease/000002.ended    it did

The file with the highest number is the lease. It is created under a name that must not exist, so of several processes
at once one gets it; its holder renames it at the end. After a kill the file stays as it is. A process on the same
machine then sees that the holder's process has ended; one on another machine waits for a sign of life, because the
holder touches its file every few seconds. Clocks of two machines are never compared.
"""

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rayk.errors import InputError, Overtaken
from rayk.storage.atomic import disk_errors

FOLDER = "lease"
"""The folder with the lease, in the leased folder."""
TOUCH_SECONDS = 3.0
"""Interval at which the holder touches its file."""
SILENCE_SECONDS = 30.0
"""Time without a touch after which a holder on another machine counts as dead."""
_POLL_SECONDS = 0.5
_FILE = re.compile(r"^(\d{6,})\.(?:json|ended)$")


class Lease:
    """The lease that this process holds on a folder."""

    def __init__(self, folder: Path, number: int):
        self.folder, self.number = folder, number
        self._file = _file(folder, number)
        self._is_lost = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._touch, name="rayk-lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Check that no other process has taken the lease, as after a pause of this one.

        Raises:
            Overtaken: one has.
        """
        if self._is_lost:
            raise Overtaken(f"Another process has continued the run in '{self.folder}', so this one stops.")

    def release(self) -> None:
        """Let other processes work in the folder. Of a folder without other files nothing is left."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if os.listdir(self.folder) == [FOLDER]:
                self._file.unlink()
            else:
                self._file.rename(self._file.with_suffix(".ended"))

    def _touch(self) -> None:
        while not self._is_lost and not self._ended.wait(TOUCH_SECONDS):
            with contextlib.suppress(OSError):  # a disk that cannot be written now may be written later
                self._is_lost = _newest(self.folder) != self.number
                os.utime(self._file)


@contextlib.contextmanager
def hold_lease(folder: Path, notify: Callable[[str], None] = lambda text: None) -> Iterator[Lease]:
    """Hold the lease on `folder`, which is created if it does not exist, and removed again if it stays empty.

    Args:
        notify: called with a sentence before a wait for a sign of life.

    Raises:
        InputError: a living process holds it, or the folder cannot be written.
        RunFailed: the disk is full.
    """
    missing = [each for each in (folder / FOLDER, folder, *folder.parents) if not each.exists()]
    try:
        lease = Lease(folder, _take(folder, notify))
        try:
            yield lease
        finally:
            lease.release()
    finally:
        for each in missing:  # those that are not empty stay
            with contextlib.suppress(OSError):
                each.rmdir()


def _take(folder: Path, notify: Callable[[str], None]) -> int:
    """Take the lease and return its number."""
    while True:
        before = _newest(folder)
        if before and (holder := _living_holder(_file(folder, before), notify)) is not None:
            raise InputError(
                f"The run in '{folder}' belongs to {holder}, which is still running; wait for its end or stop it, or "
                "give another --output."
            )
        if _newest(folder) != before:  # somebody else was faster
            continue
        number = before + 1
        with disk_errors(folder):
            is_taken = _write_new(_file(folder, number))
        if is_taken and _newest(folder) == number:
            _remove_older(folder, number)
            return number
        if is_taken:
            _file(folder, number).unlink(missing_ok=True)


def _remove_older(folder: Path, number: int) -> None:
    for name in os.listdir(folder / FOLDER):
        if (found := _FILE.match(name)) and int(found[1]) < number:
            (folder / FOLDER / name).unlink(missing_ok=True)


def _write_new(file: Path) -> bool:
    """Write the file of this process; return False if another process was faster."""
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        opened = file.open("xb")
    except FileExistsError:
        return False
    try:
        with opened:
            opened.write(json.dumps(_this_process()).encode())
    except OSError:  # the disk is full; a file without a name would keep other processes waiting
        file.unlink(missing_ok=True)
        raise
    return True


def _living_holder(file: Path, notify: Callable[[str], None]) -> str | None:
    """Return a description of the process that holds a lease; None if it has ended or released the lease."""
    try:
        holder: Any = json.loads(file.read_bytes())
        machine, pid, started = str(holder["machine"]), int(holder["pid"]), str(holder["started"])
        name = f"process {pid} on {holder['host']}"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):  # it is being written, or a kill has cut it
        machine, pid, started, name = "", 0, "", "another process"
    if machine and machine == _machine():
        return name if _start_of(pid) == started else None
    notify(f"Waiting up to {SILENCE_SECONDS:g} s to see whether {name} still works in the run directory")
    first, deadline = _touched(file), time.monotonic() + SILENCE_SECONDS
    while time.monotonic() < deadline:
        now = _touched(file)
        if now != first:
            return None if now is None else name
        time.sleep(_POLL_SECONDS)
    return None


def _touched(file: Path) -> int | None:
    """Return when a file was touched; None if it is gone. It is opened, because a network file system may otherwise
    answer from its cache."""
    try:
        with file.open("rb") as opened:
            return os.fstat(opened.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _newest(folder: Path) -> int:
    """Return the number of the lease; 0 if there is none."""
    try:
        names = os.listdir(folder / FOLDER)
    except (FileNotFoundError, NotADirectoryError):
        return 0
    return max((int(found[1]) for name in names if (found := _FILE.match(name))), default=0)


def _file(folder: Path, number: int) -> Path:
    return folder / FOLDER / f"{number:06d}.json"


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "machine": _machine(), "pid": pid, "started": _start_of(pid)}


def _machine() -> str:
    """Return an id of the processes whose numbers this process sees: of this start of the machine, and the
    container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_of(pid: int) -> str | None:
    """Return the time at which a process started, in the kernel's own count; None if there is no such process. The
    numbers of processes are used again, so a number alone is not enough."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
