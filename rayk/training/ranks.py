"""Communication between the workers of a group: agree on errors, sum and gather values."""

import copy
import traceback
from collections.abc import Callable
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
    """This worker's rank in its group, and collectives over the group; with one worker nothing is communicated.

    Args:
        world: number of workers in the group.
        local_world: number of workers on this node.
        in_ray_train: whether Ray Train has started the group.
    """

    def __init__(self, rank: int, world: int, local_world: int, *, in_ray_train: bool = False) -> None:
        self.rank, self.world, self.local_world = rank, world, local_world
        self._in_ray_train = in_ray_train
        self._group: dist.ProcessGroup | None = None

    @classmethod
    def read(cls) -> "Ranks":
        """Return the rank that Ray Train gave to this worker."""
        context = ray.train.get_context()
        world = context.get_world_size()
        return cls(context.get_world_rank(), world, context.get_local_world_size(), in_ray_train=True)

    def for_another_thread(self) -> "Ranks":
        """Return the same ranks with connections of their own, on which another thread may `gather`. A collective."""
        ranks = copy.copy(self)
        if self.world > 1:
            ranks._group = dist.new_group(backend="gloo")
        return ranks

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

    def run(self, work: Callable[[], None]) -> None:
        """Run `work`, which may fail on this rank alone; all ranks stop if it fails on any. A collective."""
        problem = None
        try:
            work()
        except AllRanksStop:  # `work` has called `agree` already
            raise
        except Exception as error:
            problem = error
        self.agree(problem)

    def sums(self, values: list[float]) -> list[float]:
        """Return each value summed over the ranks."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def maxima(self, values: list[float]) -> list[float]:
        """Return the largest of each value over the ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: list[float], operation: Any) -> list[float]:
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=_collective_device())
        dist.all_reduce(total, operation)
        return total.tolist()

    def preemption(self) -> Any:
        """Return Ray's announcement that nodes of workers go away, the same on every rank; None if there is none. A
        collective."""
        return ray.train.get_preemption_info() if self._in_ray_train else None

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every rank, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self._group)
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
