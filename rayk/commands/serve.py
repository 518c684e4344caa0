"""`rayk serve`: deploy teachers and keep them running until interrupted, for other processes to connect to."""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress

from rayk.config import TeacherConfig
from rayk.serving.cluster import cluster_variables, is_own_cluster, start_ray
from rayk.teachers import serve_teacher


def serve(teachers: list[TeacherConfig], say: Callable[[str], None]) -> None:
    """Deploy `teachers` and wait for Ctrl-C or SIGTERM.

    Args:
        say: prints a line; among them are the lines with which another process on this machine connects.

    Raises:
        InputError: a teacher cannot be started.
    """
    # A run that connects to this cluster shares its CPUs, so there are as many again as the machine has.
    needed = sum(teacher.resources.num_cpus * teacher.replicas.max for teacher in teachers if not teacher.attach)
    start_ray(needed + (os.cpu_count() or 1))
    with ExitStack() as stack:
        names = []
        for teacher in teachers:
            say(f"Starting teacher {teacher.name} ({teacher.model or 'already running'}) …")
            served = stack.enter_context(serve_teacher(teacher))
            say(
                f"Teacher {served.name} is ready: vocabulary {served.info.vocab_size:,}, {served.info.dtype} on "
                f"{served.info.device}."
            )
            names.append(served.name)
        for line in connection_help(names):
            say(line)
        with suppress(KeyboardInterrupt, SystemExit):
            while True:
                # A short sleep, because the kernel may deliver the signal to another thread, which does not end it.
                time.sleep(0.5)


def connection_help(names: list[str]) -> list[str]:
    """Return the lines that tell how another process uses the teachers `names`."""
    where = "on this machine" if is_own_cluster() else "that reaches this cluster"
    return [
        f"To use {'it' if len(names) == 1 else 'them'} in another process {where}, first run",
        *(f"  export {name}={value}" for name, value in cluster_variables().items()),
        "then, in a config:",
        *(f"  teachers: [{{name: {name}, attach: true}}]" for name in names),
        "or, in Python:",
        *(f"  rayk.connect_teacher('{name}')" for name in names),
        "Ctrl-C removes the teachers.",
    ]
