"""Communication between the workers of a group: agree on errors, sum and gather values."""

import traceback
from typing import Any

import ray.train
import torch
import torch.distributed as dist

from rayk.errors import RaykError


class AllRanksStop(Exception):
    """Some rank cannot continue; raised on every rank between two steps, with the same `problem`."""

    def __init__(self, problem: RaykError):
        super().__init__(str(problem))
        self.problem = problem


class Ranks:
    """This worker's rank in its group, and collectives over the group; with one worker nothing is communicated."""

    def __init__(self) -> None:
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.local_world = context.get_local_world_size()

    def agree(self, problem: BaseException | None) -> None:
        """Raise AllRanksStop on every rank if any rank has a problem.

        A collective (one small all-reduce): all ranks must call it, so that no rank later waits in a collective for a
        rank that has stopped.
        """
        if self.world == 1:
            if problem is not None:
                raise AllRanksStop(_as_rayk_error(problem)) from problem
            return
        has_problem = torch.tensor([problem is not None], dtype=torch.int32, device=_collective_device())
        dist.all_reduce(has_problem)
        if has_problem.item():
            problems = self.gather(None if problem is None else _as_rayk_error(problem))
            raise AllRanksStop(next(found for found in problems if found is not None)) from problem

    def sums(self, values: list[float]) -> list[float]:
        """Return each value summed over the ranks."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=_collective_device())
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every rank, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


def worker_device() -> str:
    """Return the GPU that Ray Train assigned to this worker, else the CPU."""
    return str(ray.train.torch.get_device()) if torch.cuda.is_available() else "cpu"


def _collective_device() -> str:
    return worker_device() if dist.get_backend() == "nccl" else "cpu"


def _as_rayk_error(problem: BaseException) -> RaykError:
    if isinstance(problem, RaykError):
        return problem
    return RaykError(f"{type(problem).__name__}: {problem}{_location(problem)}")


def _location(problem: BaseException) -> str:
    """Return file and line of the innermost frame outside installed packages, in parentheses."""
    frames = traceback.extract_tb(problem.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
