"""A worker among its group: what ranks agree on, sum and gather, and where each computes."""

from typing import Any

import ray.train
import torch
import torch.distributed as dist

from rayk.errors import RaykError


class StopTogether(Exception):
    """Some rank cannot go on; every rank has been told and leaves the loop between two steps."""

    def __init__(self, problem: RaykError):
        super().__init__(str(problem))
        self.problem = problem


class Ranks:
    """This worker among its group: agreement and sums. With one worker there is nobody to ask."""

    def __init__(self) -> None:
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.local_world = context.get_local_world_size()

    def agree(self, problem: BaseException | None) -> None:
        """Raise StopTogether on every rank if any has a problem. One small all-reduce, so that no rank waits in a
        later collective for one that has left."""
        if self.world == 1:
            if problem is not None:
                raise StopTogether(_as_rayk_error(problem)) from problem
            return
        troubled = torch.tensor([problem is not None], dtype=torch.int32, device=_collective_device())
        dist.all_reduce(troubled)
        if troubled.item():
            said = self.gather(None if problem is None else _as_rayk_error(problem))
            raise StopTogether(next(each for each in said if each is not None)) from problem

    def sums(self, values: list[float]) -> list[float]:
        """Each value summed over the ranks."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=_collective_device())
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


def device_of_worker() -> str:
    """The GPU that Ray Train gave this worker, else the CPU."""
    return str(ray.train.torch.get_device()) if torch.cuda.is_available() else "cpu"


def _collective_device() -> str:
    return device_of_worker() if dist.get_backend() == "nccl" else "cpu"


def _as_rayk_error(problem: BaseException) -> RaykError:
    if isinstance(problem, RaykError):
        return problem
    return RaykError(f"{type(problem).__name__}: {problem}")
