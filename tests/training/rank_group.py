"""Processes that are the ranks of one gloo group without Ray, for tests of sharding and of collectives."""

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

SECONDS = 240
"""Longest time of one call; a group in which a rank waits in vain is killed after it."""
START_SECONDS = 500
"""Longest time in which the processes start and import what they need, on a busy machine."""


class RankGroup:
    """`world` processes, started once, which run functions together.

    Args:
        folder: an empty folder for the group's rendezvous.
    """

    def __init__(self, world: int, folder: Path):
        self.world = world
        context = mp.get_context("forkserver")  # imports once, for all groups of this process
        context.set_forkserver_preload(["rayk.training.loop", "peft", "tests.tiny"])
        self._queues = [(context.SimpleQueue(), context.SimpleQueue()) for _ in range(world)]
        self._processes = [
            context.Process(target=_serve, args=(rank, world, str(folder / "store"), *self._queues[rank]), daemon=True)
            for rank in range(world)
        ]
        for process in self._processes:
            process.start()
        for _, answers in self._queues:
            assert answers._reader.poll(START_SECONDS), "a rank did not start"
            answers.get()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return `function(ranks, *arguments)` of each rank.

        Raises:
            RuntimeError: it failed on some rank, or did not end.
        """
        for jobs, _ in self._queues:
            jobs.put((function, arguments))
        results = []
        for rank, (_, answers) in enumerate(self._queues):
            if not answers._reader.poll(SECONDS):
                self.close()
                raise RuntimeError(f"rank {rank} of {self.world} did not end within {SECONDS} s")
            results.append(answers.get())
        problems = [problem for _, problem in results if problem]
        if problems:
            raise RuntimeError("\n".join(problems))
        return [value for value, _ in results]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank: int, world: int, store: str, jobs: Any, answers: Any) -> None:
    from rayk.training.ranks import Ranks

    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    answers.put(None)
    while True:
        function, arguments = jobs.get()
        try:
            answers.put((function(Ranks(rank, world, world), *arguments), None))
        except BaseException:
            answers.put((None, f"rank {rank}: {traceback.format_exc()}"))
