"""`rayk serve`: deploy teachers for other processes, until it is interrupted or until they are removed."""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress

from rayk.config import TeacherConfig
from rayk.serving.cluster import cluster_variables, is_own_cluster, start_ray
from rayk.teachers import Teacher, serve_teacher
from rayk.teachers.serve import detach_teacher, remove_teacher


def serve(teachers: list[TeacherConfig], print_line: Callable[[str], None]) -> None:
    """Deploy `teachers` and wait for Ctrl-C or SIGTERM.

    Args:
        print_line: called with each line of output, among them instructions for connecting from another process.

    Raises:
        InputError: a teacher cannot be started.
    """
    # A run that connects to a local cluster shares its logical CPUs, so add as many as the machine has.
    needed = sum(teacher.resources.num_cpus * teacher.replicas.max for teacher in teachers if not teacher.attach)
    start_ray(needed + (os.cpu_count() or 1))
    with ExitStack() as stack:
        _start_all(teachers, lambda teacher: stack.enter_context(serve_teacher(teacher)), print_line)
        print_line("Ctrl-C removes the teachers.")
        with suppress(KeyboardInterrupt, SystemExit):
            while True:
                # A short sleep, because the kernel may deliver the signal to another thread, which does not end it.
                time.sleep(0.5)


def detach(teachers: list[TeacherConfig], print_line: Callable[[str], None]) -> None:
    """Deploy `teachers` on the Ray cluster at RAY_ADDRESS and leave them there.

    Raises:
        InputError: a teacher cannot be started, or there is no such cluster.
    """
    _start_all(teachers, detach_teacher, print_line)
    print_line("The teachers stay on the cluster; `rayk serve --remove` with the same config removes them.")


def remove(teachers: list[TeacherConfig], print_line: Callable[[str], None]) -> None:
    """Remove detached `teachers` from the Ray cluster at RAY_ADDRESS.

    Raises:
        InputError: a teacher does not run there, or ends with another process.
    """
    for teacher in teachers:
        if not teacher.attach:
            remove_teacher(teacher.name)
            print_line(f"Teacher {teacher.name} is removed.")


def _start_all(
    teachers: list[TeacherConfig], start: Callable[[TeacherConfig], Teacher], print_line: Callable[[str], None]
) -> None:
    for teacher in teachers:
        print_line(f"Starting teacher {teacher.name} ({teacher.model or 'already running'}) …")
        served = start(teacher)
        print_line(
            f"Teacher {served.name} is ready: vocabulary {served.info.vocab_size:,}, {served.info.dtype} on "
            f"{served.info.device}."
        )
    for line in connection_help([teacher.name for teacher in teachers]):
        print_line(line)


def connection_help(names: list[str]) -> list[str]:
    """Return instructions for using the teachers `names` in another process, as lines."""
    where = "on this machine" if is_own_cluster() else "that reaches this cluster"
    return [
        f"To use {'it' if len(names) == 1 else 'them'} in another process {where}, first run",
        *(f"  export {name}={value}" for name, value in cluster_variables().items()),
        "then, in a config:",
        *(f"  teachers: [{{name: {name}, attach: true}}]" for name in names),
        "or, in Python:",
        *(f"  rayk.connect_teacher('{name}')" for name in names),
    ]
