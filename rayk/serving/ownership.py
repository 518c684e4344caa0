"""Ownership of Serve applications: the owner is the Ray job that removes an application, the one that has deployed it
or a later one that has taken it over.

Serve's applications outlive the jobs that deploy them. Where a job is killed before it has removed its applications,
the next one that uses them takes them over (as with `--resume`); without such a job, their own replicas remove them.

Each take-over is an entry of Ray's key-value store on the head, from the job that has ended to its successor, and is
written only if there is none. So of several jobs one becomes the owner.
"""

import asyncio
import logging
import os
import time
from typing import Any

import ray
from ray import serve
from ray.experimental import internal_kv

from rayk.serving.cluster import is_job_running

ORPHAN_SECONDS = 60.0
"""Time after the end of its owner in which an application waits for another job that takes it over."""
ORPHAN_VARIABLE = "RAYK_ORPHAN_SECONDS"
"""Environment variable of the driver that replaces `ORPHAN_SECONDS`."""
NOBODY = ""
"""Owner of an application that no job removes at its end, such as one of `rayk serve --detach`."""
_LOOK_SECONDS = 5.0
_NAMESPACE = b"rayk-owners"
_REMOVED = "-"
"""Successor of the last owner of an application that its replicas have removed."""

logger = logging.getLogger(__name__)


def owned_by_this_job() -> dict[str, Any]:
    """Return the settings of replicas whose application belongs to this process's Ray job."""
    seconds = float(os.environ.get(ORPHAN_VARIABLE) or ORPHAN_SECONDS)
    return {"owner": ray.get_runtime_context().get_job_id(), "orphan_seconds": seconds}


def owned_by_nobody() -> dict[str, Any]:
    """Return the settings of replicas whose application stays until somebody removes it."""
    return {"owner": NOBODY}


def take_over(application: str, deployer: str) -> bool:
    """Make this job the owner of a running application if the owner has ended; return whether it has become that.

    Args:
        deployer: the job that has deployed it.
    """
    owner = _owner(application, deployer)
    return not _is_alive(owner) and _succeed(application, owner, ray.get_runtime_context().get_job_id())


def is_being_removed(application: str, deployer: str) -> bool:
    """Return whether the replicas of an application are removing it, because nobody has taken it over."""
    return _owner(application, deployer) == _REMOVED


def watch_owner(settings: dict[str, Any]) -> asyncio.Task[None] | None:
    """Begin to watch the owner of this replica's application, which is removed when it has been without one for the
    time in `settings`. The task must be kept."""
    if settings.get("owner", NOBODY) == NOBODY:
        return None
    application = serve.get_replica_context().app_name
    return asyncio.create_task(_watch(application, settings["owner"], settings["orphan_seconds"]))


async def _watch(application: str, deployer: str, seconds: float) -> None:
    seen_at = time.monotonic()
    while True:
        await asyncio.sleep(min(_LOOK_SECONDS, seconds / 2))
        try:
            owner = await asyncio.to_thread(_owner, application, deployer)
            if owner == _REMOVED:
                return
            if await asyncio.to_thread(_is_alive, owner):
                seen_at = time.monotonic()
            elif time.monotonic() - seen_at > seconds and await asyncio.to_thread(
                _succeed, application, owner, _REMOVED
            ):
                logger.warning("Removing %s, whose owner has ended.", application)
                await asyncio.to_thread(serve.delete, application, _blocking=False)
                return
        except ray.exceptions.RayError:  # the head is busy or restarts
            seen_at = time.monotonic()


def _is_alive(owner: str) -> bool:
    return owner == NOBODY or is_job_running(owner)


def _owner(application: str, deployer: str) -> str:
    """Return the last of the jobs that have owned an application."""
    owner = deployer
    while successor := internal_kv._internal_kv_get(_key(application, owner), namespace=_NAMESPACE):
        owner = successor.decode()
    return owner


def _succeed(application: str, owner: str, successor: str) -> bool:
    """Note the successor of an owner that has ended; return False if it has another one already."""
    key = _key(application, owner)
    return not internal_kv._internal_kv_put(key, successor.encode(), overwrite=False, namespace=_NAMESPACE)


def _key(application: str, owner: str) -> bytes:
    return f"{application}/{owner}".encode()
